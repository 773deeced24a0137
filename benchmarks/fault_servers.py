"""Faults of what lies elsewhere: a registry's remote, and a lakeFS server. See benchmarks/fault_points.py.

No real lakeFS server or object store fails on demand: the lakeFS points run the real store against the stand-in of
tests/infra/lakefs_server.py over loopback HTTP, the S3 points against a server that refuses every request or is not there.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import urllib3

from benchmarks.fault_kinds import full, small_disk
from benchmarks.fault_points import BY, POLICY, Lost, Seen, State, copied, fill, inspect_cache, state_of, told
from benchmarks.fault_tracer import shown, traced
from infra.stores.base import ArtifactRef, ArtifactStore, directory_digest
from infra.stores.dvc import DvcStore
from infra.stores.lakefs import LakeFSStore
from infra.stores.lakefs_access import Access
from infra.stores.lakefs_server import Server
from models.errors import DigestMismatch, DiskFull, ServerUnreachable, StoreError
from tests.infra.lakefs_server import KEY_ID, SECRET, LakeFS

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
ALWAYS = 10**6
EVIDENCE = ["e" * 64]  # the stand-in asks for some
IMPATIENT = {"retries": 1, "backoff_s": 0.01, "timeout": urllib3.Timeout(connect=5, read=5)}  # ours
EXPIRED = b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>'


# A registry's remote


def _put(template: Path, root: Path, remote: str) -> ArtifactRef:
    store = DvcStore(root, remote=remote)
    return store.put(POLICY, template / "new", parents=[store.versions("reward_model")[-1].ref])


def _completes(template: Path, root: Path, remote: Path) -> None:
    """The next put succeeds, and the remote alone can bring its bytes back."""
    ref = _put(template, root, str(remote))
    shutil.rmtree(root / ".dvc" / "cache")
    shutil.rmtree(root / "checkouts", ignore_errors=True)
    if directory_digest(DvcStore(root, remote=str(remote)).get(ref))[0] != ref.digest:
        raise Lost("the remote holds other bytes")


def _refused(template: Path, root: Path, remote: str, before: State, *kinds: type[StoreError]) -> str:
    """What a put is told that cannot reach or write its remote; the registry, opened without it, is as it was."""
    error = told(partial(_put, template, root, remote), *kinds)
    if inspect_cache(root) != before:
        raise Lost("the refused put changed the state")
    return error


@contextmanager
def _read_only(folder: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A remote that takes nothing, and what makes it take something: a read-only mount, or a folder of mode 0555 where one may not
    mount."""
    if os.geteuid():
        remote = folder / "remote"
        remote.mkdir(mode=0o555)
        yield remote, partial(remote.chmod, 0o755)
        return
    with small_disk(folder) as disk:
        (disk / "remote").mkdir()
        remount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(remount, check=True)
        yield disk / "remote", partial(subprocess.run, [*remount[:2], "remount,rw", str(disk)], check=True)


def read_only_remote(template: Path, folder: Path) -> Seen:
    root = copied(template, "put", folder)
    before = state_of(DvcStore(root))
    with _read_only(folder) as (remote, allow):
        error = _refused(template, root, str(remote), before, StoreError)
        allow()
        _completes(template, root, remote)
    return Seen("put, remote mounted read-only" if not os.geteuid() else "put, remote of mode 0555", "before", error)


def full_remote(template: Path, folder: Path) -> Seen:
    root = copied(template, "put", folder)
    before = state_of(DvcStore(root))
    with small_disk(folder) as disk:
        with full(disk, 100 << 10):
            error = told(partial(_put, template, root, str(disk / "remote")), DiskFull)
            if inspect_cache(root) != before:
                raise Lost("the refused put changed the state")
        _completes(template, root, disk / "remote")
    return Seen("put, remote with 100 KiB free", "before", error)


def truncated_upload(share: float, template: Path, folder: Path) -> Seen:
    """Kill -9 a put in the middle of its upload, at a share of the changes it makes in the remote."""
    probe = copied(template, "put", folder / "probe")
    remote = folder / "remote"
    there = traced(partial(_put, template, probe, str(remote))).changes
    at = [number for number, change in enumerate(there, 1) if f"{remote}/" in change]
    shutil.rmtree(remote)
    root = copied(template, "put", folder)
    before = state_of(DvcStore(root))
    end = traced(partial(_put, template, root, str(remote)), at[int(share * (len(at) - 1))])
    if not end.killed:
        raise Lost("the put had ended before it was to be killed")
    if inspect_cache(root) != before:
        raise Lost("the killed put changed the state")
    _completes(template, root, remote)
    return Seen(f"kill -9 before {shown(end.changes[-1])}", "before", "(killed)")


def cut_in_remote(template: Path, folder: Path) -> Seen:
    """An object in the remote is cut short, as an upload without a check would leave it; a put of the same file sends it again."""
    root, remote = copied(template, "put", folder), folder / "remote"
    _put(template, root, str(remote))
    _largest(remote, cut=True)
    _completes(template, root, remote)
    return Seen("object in the remote cut; put again", "after, mended")


def corrupt_remote(template: Path, folder: Path) -> Seen:
    """The cache is lost and the remote holds an altered object: that is told; with the object restored the version comes back."""
    root, remote = copied(template, "put", folder), folder / "remote"
    ref = _put(template, root, str(remote))
    before = state_of(DvcStore(root))
    path, content = _largest(remote)
    shutil.rmtree(root / "checkouts", ignore_errors=True)
    shutil.rmtree(root / ".dvc" / "cache")
    store = DvcStore(root, remote=str(remote))
    error = told(partial(store.get, ref), DigestMismatch)
    if state_of(DvcStore(root)) != before:
        raise Lost("a get changed the state")
    path.write_bytes(content)
    _completes(template, root, remote)
    return Seen("object in the remote altered, cache lost; get", "before", error)


def _largest(remote: Path, cut: bool = False) -> tuple[Path, bytes]:
    """Damage the largest object; where it is, and what it held."""
    path = max((p for p in remote.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(content) // 2] if cut else content[:-1] + bytes([content[-1] ^ 1]))
    return path, content


class _Refusing(BaseHTTPRequestHandler):
    """An S3 server for whom every token has expired."""

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(EXPIRED)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(EXPIRED)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def s3_remote(how: str, template: Path, folder: Path) -> Seen:
    """A put whose S3 remote is not there, or does not take its credentials any more; without the remote the registry goes on."""
    root = copied(template, "put", folder)
    before = state_of(DvcStore(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = closed_port() if how == "unreachable" else server.server_address[1]
        said = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}
        with patch.dict(os.environ, said | {"AWS_ACCESS_KEY_ID": "expired", "AWS_SECRET_ACCESS_KEY": "expired"}):
            error = _refused(
                template, root, "s3://bucket/prefix", before, *((ServerUnreachable,) if how == "unreachable" else (StoreError,))
            )
        server.shutdown()
    _completes(template, root, folder / "remote")
    return Seen(f"put, S3 remote: {how}", "before", error)


# lakeFS


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


LAKEFS_FAULTS: dict[str, Callable[[LakeFS], object]] = {
    "expired credentials": lambda server: [server.fail(method, ".*", 401, ALWAYS) for method in METHODS],
    "read-only credentials": lambda server: [server.fail(method, ".*", 403, ALWAYS) for method in ("POST", "PUT", "DELETE")],
    "upload cut": lambda server: [server.fail(method, "/objects$", "cut", ALWAYS) for method in ("POST", "PUT")],
    "cut before the tag": lambda server: server.fail("POST", "/tags$", "cut", ALWAYS),
}


def lakefs(how: str, operation: str, template: Path, folder: Path) -> Seen:
    """A put, a stage move or a get through lakeFS while the server is not there or fails; afterwards it is well again."""
    with LakeFS() as server:
        store = _opened(server.endpoint, folder / "cache")
        above = store.put("reward_model", template / "new")
        store.assign(above, "staging", **BY, evidence=EVIDENCE)
        before = state_of(store)
        fresh = folder / "elsewhere"  # nothing is remembered there
        other = fill(folder / "other", "other")
        works: dict[str, Callable[[ArtifactStore], object]] = {
            "put": lambda each: each.put(POLICY, other, parents=[above]),
            "move": lambda each: each.assign(above, "production", **BY, evidence=EVIDENCE),
            "get": lambda each: each.get(above),
        }
        if how == "unreachable":
            faulty, kind = _opened(f"http://127.0.0.1:{closed_port()}", fresh), ServerUnreachable
        else:
            faulty, kind = _opened(server.endpoint, fresh), StoreError
            LAKEFS_FAULTS[how](server)
        error = told(partial(works[operation], faulty), kind, ServerUnreachable)
        server.faults.clear()
        again = _opened(server.endpoint, folder / "again")
        if state_of(again) != before:
            raise Lost("the refused operation changed the state")
        works[operation](again)
        versions, moves = state_of(_opened(server.endpoint, folder / "last"))
        if operation != "get" and (versions, moves) == before:
            raise Lost("the operation, repeated, left no trace")
        last = _opened(server.endpoint, folder / "last")
        for version in last.versions():
            if directory_digest(last.get(version.ref))[0] != version.ref.digest:
                raise Lost(f"{version.ref.name} {version.number} is not what its digest says")
    return Seen(f"{operation} through lakeFS: {how}", "before", error)


def _opened(endpoint: str, root: Path) -> LakeFSStore:
    return LakeFSStore(Server("faults", Access(endpoint, KEY_ID, SECRET), **IMPATIENT), root)
