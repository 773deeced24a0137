"""Every fault of the matrix but kill -9: full disks, damaged bytes, races, clocks, tags. See benchmarks/fault_points.py."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import filelock
import pygit2

from benchmarks.fault_points import (
    OPERATIONS,
    POLICY,
    SMALL_BYTES,
    Lost,
    Seen,
    State,
    copied,
    fill,
    goes_on,
    inspect,
    inspect_cache,
    result_of,
    state_of,
    told,
)
from infra.signing import Keys
from infra.stores.base import Version
from infra.stores.dvc import DvcStore
from models.errors import AuditBroken, DigestMismatch, DiskFull, GateRefused, OneRewardError
from ops.lineage import RELEASE
from ops.promote import STAGES
from ops.verify import released

ROOT = Path(__file__).parents[1]
DISK_BYTES = 32 << 20  # of the small file system; ours
READ_S = 1.0  # how long processes that race have to read before one may write; ours


# Full disk


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 32 MiB at `folder`/disk. Raises Lost where none can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise Lost(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def full(disk: Path, left: int) -> Iterator[None]:
    """Let `left` bytes be free."""
    ballast = disk / "ballast"
    space = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - left)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def limited(left: int) -> Iterator[None]:
    """No file may grow beyond `left` bytes: what a user who may not mount has for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full(operation: str, left: int, template: Path, folder: Path) -> Seen:
    after = result_of(operation, template, folder / "after")
    if os.geteuid():
        root = copied(template, operation, folder)
        left = min(left, SMALL_BYTES) if operation == "put" else 0  # a limit on each file, not on all: it has to be met
        return _disk_full(operation, template, root, limited(left), f"no file beyond {left} bytes", after)
    with small_disk(folder) as disk:
        root = copied(template, operation, disk)
        return _disk_full(operation, template, root, full(disk, left), f"tmpfs with {left >> 10} KiB free", after)


def _disk_full(operation: str, template: Path, root: Path, fault: AbstractContextManager[None], how: str, after: State) -> Seen:
    before = state_of(DvcStore(root))
    with fault:
        error = told(partial(OPERATIONS[operation], template, root), DiskFull)
        reopened = ended_with(lambda: DvcStore(root).versions())
        if reopened and not reopened.startswith(DiskFull.__name__):
            raise Lost(f"opened on the full disk: {reopened}")
    if state_of(DvcStore(root)) != before:
        raise Lost("the refused operation changed the state")
    return Seen(f"{operation}, {how}", goes_on(operation, template, root, before, after), error)


# Damaged bytes


def damage(root: Path, version: Version, how: str) -> tuple[Path, bytes]:
    """Alter, cut or remove the largest cache object of a version: where it was and what it held."""
    weights = (DvcStore(root).get(version.ref) / "model" / "weights").read_bytes()
    path = next(
        p for p in (root / ".dvc" / "cache").rglob("*") if p.is_file() and p.stat().st_size == len(weights) and p.read_bytes() == weights
    )
    path.chmod(0o644)
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, len(weights) // 2)
    else:
        path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    shutil.rmtree(root / "checkouts")
    return path, weights


def mend(path: Path, content: bytes) -> None:
    """Do what the remedy says: bring the bytes back from a backup."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)


def damaged(how: str, meets: str, template: Path, folder: Path) -> Seen:
    """A damaged object is met by a get, by a promotion above it or by a rollback to it."""
    operation = "put" if meets == "get" else meets
    after = result_of(operation, template, folder / "after")
    root = copied(template, operation, folder)
    before = state_of(DvcStore(root))
    name = {"get": POLICY, "promote": "reward_model", "rollback": RELEASE}[meets]
    version = next(v for v in DvcStore(root).versions(name) if v.number == 1)
    kept = damage(root, version, how)
    shutil.rmtree(root / "checkouts", ignore_errors=True)
    work = partial(DvcStore(root).get, version.ref) if meets == "get" else partial(OPERATIONS[meets], template, root)
    error = told(work, DigestMismatch, GateRefused)
    if state_of(DvcStore(root)) != before:
        raise Lost("the refused operation changed the state")
    mend(*kept)
    return Seen(f"cache object {how}; {meets}", goes_on(operation, template, root, before, after), error)


def damaged_beside(how: str, template: Path, folder: Path) -> Seen:
    """A version that holds the damaged file whole is put: that is refused, or the file is whole from then on."""
    root = copied(template, "put", folder)
    store = DvcStore(root)
    before = state_of(store)
    version = store.versions(POLICY)[0]
    kept = damage(root, version, how)
    (fill(folder / "beside", "beside") / "model" / "weights").write_bytes(kept[1])
    error = ended_with(lambda: DvcStore(root).put(POLICY, folder / "beside"))
    if error:
        mend(*kept)
    state = inspect_cache(root)
    if (state == before) != bool(error):
        raise Lost(f"told {error!r}, but the state says otherwise")
    OPERATIONS["put"](template, root)
    inspect(root)
    return Seen(f"cache object {how}; put of the same file", "before" if error else "after, mended", error)


# Several at once, clocks, tags


def ended_with(work: Callable[[], object]) -> str:
    """The error of this project that `work` ended with, or "". Others go on to the caller."""
    try:
        work()
    except OneRewardError as error:
        return f"{type(error).__name__}: {error.what}"
    return ""


def at_once(root: Path, *works: Callable[[], object]) -> list[str]:
    """Run each in a process of its own; all have read before the first may write. The error each was told, or ""."""
    context = multiprocessing.get_context("fork")
    answers = [context.Pipe(duplex=False) for _ in works]

    def run(work: Callable[[], object], answer: Connection) -> None:
        answer.send(ended_with(work))

    with filelock.FileLock(root / ".lock"):
        processes = [context.Process(target=run, args=(work, answer[1])) for work, answer in zip(works, answers, strict=True)]
        for process in processes:
            process.start()
        time.sleep(READ_S)
    for process in processes:
        process.join()
        if process.exitcode:
            raise Lost("one of two processes at once ended with an error that is none of ours")
    return [answer[0].recv() for answer in answers]


def race(first: str, second: str, template: Path, folder: Path) -> Seen:
    """Two operations at once lead to what one of them after the other leads to, or one is refused."""
    operation = first if first == second else "promote"
    orders = []
    for number, order in enumerate([(first,), (second,), (first, second), (second, first)]):
        alone = copied(template, operation, folder / str(number))
        for each in order:
            ended_with(partial(OPERATIONS[each], template, alone))
        orders.append(state_of(DvcStore(alone)))
    root = copied(template, operation, folder)
    errors = at_once(root, *(partial(OPERATIONS[each], template, root) for each in (first, second)))
    state = inspect_cache(root)
    allowed = [order for order, wanted in zip(orders, (errors[1], errors[0], not any(errors), not any(errors)), strict=True) if wanted]
    if state not in allowed:
        raise Lost(f"neither order leads there: {sorted(state[1] - orders[0][1])}, told {errors}")
    return Seen(f"{first} and {second} at once", "one after the other", next(filter(None, errors), ""))


CLOCK_BACK = """
import datetime, pathlib, sys, time
import pygit2
now, sign, DAY = time.time, pygit2.Signature, 86400
class Yesterday(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Yesterday
time.time = lambda: now() - DAY
pygit2.Signature = lambda name, email, when=None: sign(name, email, int(time.time()) if when is None else when, 0)
from benchmarks.fault_points import OPERATIONS
for operation in sys.argv[1].split():
    OPERATIONS[operation](*map(pathlib.Path, sys.argv[2:]))
"""


def clock_back(operations: str, template: Path, folder: Path) -> Seen:
    """A process whose clock is a day behind works on the registry, one after others of today."""
    first = operations.split()[0]
    expected = copied(template, first, folder / "expected")
    for operation in operations.split():
        OPERATIONS[operation](template, expected)
    root = copied(template, first, folder)
    newest = DvcStore(root).versions()[-1]
    command = [sys.executable, "-c", CLOCK_BACK, operations, str(template), str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Lost(done.stderr.strip().splitlines()[-1])
    if inspect_cache(root) != state_of(DvcStore(expected)):
        raise Lost("another state than with a clock that goes forward")
    last = DvcStore(root).versions()[-1]
    if first == "put" and (last.ref == newest.ref or last.created <= newest.created):
        raise Lost("the version stored last is not the newest")
    OPERATIONS["put"](template, root)
    inspect(root)
    return Seen(f"{operations}, clock a day back", "after")


def deleted_tag(tag: str, template: Path, folder: Path) -> Seen:
    """A tag is deleted by hand: who asks for production and who moves it is told, or nothing changes. Restored, all goes on."""
    after = result_of("promote", template, folder / "after")
    root = copied(template, "promote", folder)
    before = state_of(DvcStore(root))
    repo = pygit2.Repository(str(root))
    target = repo.references[f"refs/tags/{tag}"].target
    repo.references.delete(f"refs/tags/{tag}")
    error = ended_with(lambda: released(DvcStore(root), Keys(root.parent / "keys"), STAGES[-1]))
    if error:
        told(partial(OPERATIONS["promote"], template, root), AuditBroken, GateRefused)
        repo.references.create(f"refs/tags/{tag}", target)
    elif state_of(DvcStore(root)) != before:
        raise Lost(f"{tag} is gone, production is another, and nobody was told")
    return Seen(f"git tag -d '{tag}'", goes_on("promote", template, root, before, after), error)
