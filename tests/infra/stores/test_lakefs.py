"""The lakeFS store, on the stand-in (tests/infra/lakefs_server.py) and, where LAKEFS_ENDPOINT is set, on that server."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3

from infra.progress import Progress
from infra.stores import lakefs_server
from infra.stores.base import ArtifactRef, directory_digest
from infra.stores.lakefs import LakeFSStore, prepare
from infra.stores.lakefs_access import Access, connect
from infra.stores.lakefs_server import Server, open_server
from infra.workspace import Workspace
from models.errors import ConfigError, DigestMismatch, DiskFull, OneRewardError, ServerUnreachable, StoreError
from tests.infra.lakefs_server import KEY_ID, SECRET, LakeFS
from tests.infra.stores.contract import StoreContract, folder_with

QUICK: dict[str, Any] = {"retries": 3, "backoff_s": 0.01, "timeout": urllib3.Timeout(connect=5, read=5), "part_bytes": 50}
EVIDENCE = ["e" * 64]
ROOT = Path(__file__).parents[3]
OBJECTS, COMMITS = "/branches/put-.*/objects$", "/branches/put-.*/commits$"


@pytest.fixture
def lakefs() -> Iterator[LakeFS]:
    """A stand-in whose pages hold two entries, so that every listing has several."""
    with LakeFS(page=2) as server:
        yield server


def opened(lakefs: LakeFS, root: Path, **changed: Any) -> LakeFSStore:
    return LakeFSStore(Server("onereward", Access(lakefs.endpoint, KEY_ID, SECRET), connect, **QUICK | changed), root)


@pytest.fixture
def store(lakefs: LakeFS, tmp_path: Path) -> LakeFSStore:
    return opened(lakefs, tmp_path / "cache")


class TestThroughTheServer(StoreContract):
    """The contract, on the stand-in."""

    presign = False
    # A commit's objects never change: what the server's storage lost, only its backup brings back.
    test_bytes_that_were_lost_come_back_with_the_same_content = None

    @pytest.fixture
    def store(self, lakefs: LakeFS, tmp_path: Path) -> LakeFSStore:
        self.lakefs = lakefs
        lakefs.presign = lakefs.multipart = self.presign
        return opened(lakefs, tmp_path / "cache")

    def reopen(self, store: Any) -> LakeFSStore:
        return opened(self.lakefs, store.root)

    def damage(self, store: Any, content: bytes, how: str) -> None:
        for address in [address for address, blob in self.lakefs.blobs.items() if blob == content]:
            if how == "altered":
                self.lakefs.blobs[address] = bytes(len(content))
            else:
                del self.lakefs.blobs[address]


class TestPresigned(TestThroughTheServer):
    """The same with bytes going to and from an object store, in parts of 50 bytes."""

    presign = True


@pytest.mark.skipif(not os.environ.get("LAKEFS_ENDPOINT"), reason="LAKEFS_ENDPOINT names no lakeFS server: only the stand-in was tested")
class TestRealServer(StoreContract):
    """The same on a real server, in a repository of its own that is deleted afterwards. Bytes on a real server cannot be damaged."""

    test_damaged_bytes_are_told_and_never_handed_out = None  # type: ignore[assignment]
    test_bytes_that_were_lost_come_back_with_the_same_content = None

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LakeFSStore]:
        repository = f"onereward-test-{secrets.token_hex(4)}"
        if place := os.environ.get("LAKEFS_STORAGE_NAMESPACE"):
            monkeypatch.setenv("LAKEFS_STORAGE_NAMESPACE", f"{place}/{repository}")
        server = open_server(repository)
        prepare(server)
        yield LakeFSStore(server, tmp_path / "cache")
        server._api.repositories_api.delete_repository(server.repository)

    def reopen(self, store: Any) -> LakeFSStore:
        return LakeFSStore(open_server(store.server.repository), store.root)

    def damage(self, store: Any, content: bytes, how: str) -> None:
        """Not possible from here."""


def test_a_run_has_a_branch_and_promotion_alone_reaches_main(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    parent = store.put("onnx", folder_with(tmp_path / "a", x="1"), run_id="one")
    other = store.put("onnx", folder_with(tmp_path / "b", x="2"), run_id="two/2")
    release = store.put("release", folder_with(tmp_path / "c", x="3"), run_id="one", parents=[parent], code_version="c1")
    repo = lakefs.repositories["onereward"]
    assert repo.branches.keys() == {"main", "run-one", "run-two-2"}
    assert {path.split("/")[2] for path in repo.tree("run-one") if path.startswith("artifacts")} == {parent.digest, release.digest}
    assert repo.tree("main").keys() == {"_lakefs_actions/evidence.yaml"}
    assert repo.tags.keys() == {"onnx.v000001", "onnx.v000002", "release.v000001"}
    said = repo.commits[repo.tags["release.v000001"]].metadata
    assert (said["digest"], said["run"], said["code"]) == (release.digest, "one", "c1")

    approved = store.assign(release, "approved", approver="kim", reason="looks good")
    assert repo.tree("main").keys() == {"_lakefs_actions/evidence.yaml"}
    move = store.assign(release, "staging", approver="kim", reason="better", evidence=EVIDENCE)
    digests = {path.split("/")[2] for path in repo.tree("main") if path.startswith("artifacts")}
    assert digests == {parent.digest, release.digest} and other.digest not in digests
    said = repo.commits[repo.tags["release.move.000002"]].metadata
    assert (said["stage"], said["approver"], said["evidence"]) == ("staging", "kim", EVIDENCE[0])
    assert opened(lakefs, tmp_path / "elsewhere").moves("release") == [approved, move]


def test_main_refuses_direct_writes_and_merges_without_evidence(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    ref = store.put("release", folder_with(tmp_path / "a", x="1"))
    with pytest.raises(StoreError, match="protected"):
        store.server.commit("main", "by hand", {})
    with pytest.raises(StoreError, match="evidence"):
        store.assign(ref, "production", approver="kim", reason="r", evidence=["none"])
    assert store.stage("release", "production") is None and store.moves("release") == []
    store.assign(ref, "production", approver="kim", reason="r", evidence=EVIDENCE)
    assert store.stage("release", "production") == ref


def test_what_a_cut_put_sent_is_not_sent_again(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", **{f"f{n}": str(n) for n in range(6)})
    lakefs.fail("POST", COMMITS, 400)
    with pytest.raises(StoreError, match="commit"):
        store.put("onnx", folder, run_id="r")
    assert store.versions() == [] and lakefs.count("POST", OBJECTS) == 7
    assert store.gc(dry_run=False).paths == ()  # it was touched just now: somebody may be at it
    lines: list[str] = []
    ref = store.put("onnx", folder, run_id="r", progress=Progress(lines.append))
    assert lakefs.count("POST", OBJECTS) == 7 and [v.ref for v in store.versions()] == [ref]
    assert directory_digest(store.get(ref))[0] == ref.digest


def test_what_a_cut_get_fetched_is_not_fetched_again(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    ref = store.put("onnx", folder_with(tmp_path / "a", **{f"f{n}": str(n) for n in range(6)}))
    asked = "/refs/onnx.v000001/objects$"
    lakefs.fail("GET", asked, 403)
    with pytest.raises(StoreError, match="403"):
        store.get(ref)
    assert not (store.root / "checkouts" / ref.digest).exists()
    assert directory_digest(store.get(ref))[0] == ref.digest and lakefs.count("GET", asked) == 7 + 1


def test_leftovers_of_runs_that_are_over_are_collected(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    kept = store.put("onnx", folder_with(tmp_path / "a", x="1"), run_id="dead")
    for run in ("dead", "live"):
        lakefs.fail("POST", COMMITS, 400)
        with pytest.raises(StoreError):
            store.put("onnx", folder_with(tmp_path / run, x=run), run_id=run)
    for repo in lakefs.repositories.values():
        for branch in repo.branches.values():
            branch.staged = {path: stats.copy(update={"mtime": 0}) for path, stats in branch.staged.items()}
    report = store.gc(dry_run=True, live=["live"])
    assert len(report.paths) == 1 and report.bytes == len("dead") + len("in every version") and report.dry_run
    assert store.gc(dry_run=False, live=["live"]).paths == report.paths and store.gc(live=["live"]).paths == ()
    assert directory_digest(opened(lakefs, tmp_path / "new").get(kept))[0] == kept.digest


@pytest.mark.parametrize("how", [500, 503, 429, "cut"])
@pytest.mark.parametrize("presign", [False, True])
def test_a_server_that_is_away_for_a_moment_is_waited_for(
    store: LakeFSStore, lakefs: LakeFS, tmp_path: Path, how: Any, presign: bool
) -> None:
    lakefs.presign = lakefs.multipart = presign
    faults = [
        ("POST", "/branches$"),
        ("POST", OBJECTS),
        ("PUT", "/_storage/"),
        ("POST", "/merge/"),
        ("POST", COMMITS),
        ("POST", "/tags$"),
    ]
    for method, path in faults:
        lakefs.fail(method, path, how)
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1" * 120))
    lakefs.fail("GET", "/objects$", how)
    lakefs.fail("GET", "/_storage/", "cut body" if how == "cut" else how)
    assert directory_digest(store.get(ref))[0] == ref.digest and len(store.versions()) == 1
    store.assign(ref, "production", approver="kim", reason="r", evidence=EVIDENCE)
    assert store.stage("onnx", "production") == ref


def test_a_download_goes_on_where_it_was_cut(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    ref = store.put("onnx", folder_with(tmp_path / "a", big=os.urandom(3_000_000)))
    lakefs.fail("GET", "/refs/.*/objects$", "cut body", times=2)
    assert directory_digest(store.get(ref))[0] == ref.digest


def test_an_answer_that_was_lost_is_no_second_version(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    """The tag was made, the answer did not arrive: the repeated request meets its own tag."""
    lakefs.fail("POST", "/tags$", "cut body")
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
    lakefs.fail("POST", "/tags$", "cut body")
    move = store.assign(ref, "production", approver="kim", reason="r", evidence=EVIDENCE)
    assert [v.number for v in store.versions()] == [1] and store.moves("onnx") == [move]


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        (401, StoreError, "LAKEFS_SECRET_ACCESS_KEY"),
        (403, StoreError, "administrator"),
        (404, StoreError, "deleted"),
        (409, StoreError, "again"),
        (412, StoreError, "hook"),
        (500, ServerUnreachable, "again"),
        ("cut", ServerUnreachable, "Start the server"),
        (0.6, ServerUnreachable, "Start the server"),
    ],
)
def test_a_failure_leaves_no_version_and_says_what_to_do(
    lakefs: LakeFS, store: LakeFSStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any, error: type[OneRewardError], said: str
) -> None:
    hurried = opened(lakefs, tmp_path / "cache", retries=1, timeout=urllib3.Timeout(connect=5, read=0.2))
    monkeypatch.setattr("infra.stores.lakefs.ATTEMPTS", 2)
    lakefs.fail("POST", COMMITS, how, times=99)
    folder = folder_with(tmp_path / "a", x="1")
    with pytest.raises(error) as caught:
        hurried.put("onnx", folder)
    assert said in caught.value.remedy and "commit" in caught.value.what
    assert store.versions() == []
    lakefs.faults.clear()
    assert store.put("onnx", folder).digest == directory_digest(folder)[0]


def test_a_server_without_space_is_a_full_disk(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    lakefs.reason = "write /data/x: no space left on device"
    lakefs.fail("POST", OBJECTS, 500, times=99)
    with pytest.raises(DiskFull, match="no space"):
        store.put("onnx", folder_with(tmp_path / "a", x="1"))


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with LakeFS() as gone:
        pass
    with pytest.raises(ServerUnreachable, match=gone.endpoint):
        opened(gone, tmp_path, retries=0).versions()


def test_writers_and_promoters_take_turns(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    """Eight at once, each with a store of its own: every version has a number and every move a counter of its own."""
    folders = [folder_with(tmp_path / str(n), x=str(n // 2)) for n in range(8)]  # two of each
    stores = [opened(lakefs, tmp_path / f"cache{n}") for n in range(8)]
    start = threading.Barrier(8)

    def put(n: int) -> ArtifactRef:
        start.wait()
        return stores[n].put("release", folders[n], run_id=f"r{n}")

    def promote(n: int) -> int:
        start.wait()
        return stores[n].assign(refs[n], "production", approver=f"a{n}", reason="r", evidence=EVIDENCE).counter

    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(put, range(8)))
        assert [v.number for v in store.versions("release")] == [1, 2, 3, 4]
        counters = list(pool.map(promote, range(8)))
    moves = store.moves("release")
    assert sorted(counters) == [move.counter for move in moves] == list(range(1, 9))
    assert {move.approver for move in moves} == {f"a{n}" for n in range(8)}
    production = store.stage("release", "production")
    assert production is not None and production.digest == moves[-1].digest


def test_a_path_cannot_leave_the_checkout(lakefs: LakeFS, store: LakeFSStore, tmp_path: Path) -> None:
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
    repo = lakefs.repositories["onereward"]
    tree = repo.commits[repo.tags["onnx.v000001"]].tree
    path = f"artifacts/onnx/{ref.digest}/../../escaped"
    tree[path] = next(iter(tree.values())).copy(update={"path": path})
    with pytest.raises(DigestMismatch, match="leaves its folder"):
        store.get(ref)
    assert not list(store.root.rglob("escaped"))


def test_no_credential_is_told(lakefs: LakeFS, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in errors and what caused them, logs, the text forms of our objects, what the server keeps, or files here."""
    for name, value in lakefs.environment.items():
        monkeypatch.setenv(name, value)
    lakefs.presign = lakefs.multipart = True
    lakefs.reason = f"refused for {KEY_ID} with {SECRET}"
    caplog.set_level(logging.INFO)
    store = opened(lakefs, tmp_path / "cache")
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1" * 120), metadata={"n": 1})
    texts = [repr(store), repr(store.server), repr(Access.from_env()), repr(store.versions()), ref.uri]
    for method, path, how in [
        ("PUT", "/_storage/", "cut"),
        ("PUT", "/_storage/", 403),
        ("POST", COMMITS, 401),
        ("GET", "/tags$", "cut"),
    ]:
        lakefs.fail(method, path, how, times=99)
        with pytest.raises(OneRewardError) as caught:
            store.put("onnx", folder_with(tmp_path / "b", x=secrets.token_hex(60)))
        texts.append("".join(str(entry) for entry in caught.getrepr(chain=True).chain))
        lakefs.faults.clear()
    texts += [str(commit) for commit in lakefs.repositories["onereward"].commits.values()]
    texts += [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    signatures = [*lakefs.signatures]
    assert signatures and len(texts) > 10
    for secret in (SECRET, KEY_ID, *signatures):
        assert secret not in caplog.text and not any(secret in text for text in texts)


@pytest.mark.parametrize("endpoint", ["lakefs.example.com:8000", "http://", "http://127.0.0.1:port", "http://[::1", "http://a b/"])
def test_a_malformed_endpoint_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, lakefs: LakeFS, endpoint: str) -> None:
    for name, value in (lakefs.environment | {"LAKEFS_ENDPOINT": endpoint}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="LAKEFS_ENDPOINT") as caught:
        open_server("onereward")
    assert endpoint in str(caught.value) and "\n" not in str(caught.value)


def test_credentials_in_an_endpoint_are_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, lakefs: LakeFS) -> None:
    for name, value in (lakefs.environment | {"LAKEFS_ENDPOINT": f"http://{KEY_ID}:{SECRET}@127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        open_server("onereward")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("client", ["", "lakefs-client"])
def test_one_line_chooses_the_store(lakefs: LakeFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """And one variable the deprecated client package, which does the same."""
    lakefs.presign = lakefs.multipart = True
    monkeypatch.setattr(lakefs_server, "PART_BYTES", 50)
    for name, value in (lakefs.environment | {"ONEREWARD_STORE": "lakefs://onereward", "LAKEFS_CLIENT": client}).items():
        monkeypatch.setenv(name, value)
    store = Workspace.from_env(tmp_path / "home").store
    assert isinstance(store, LakeFSStore)
    assert type(store.server._api).__module__.split(".")[0] == ("lakefs_client" if client else "lakefs_sdk")
    ref = store.put("release", folder_with(tmp_path / "a", x="1" * 120, y="2"), key="k")
    move = store.assign(ref, "production", approver="kim", reason="r", evidence=EVIDENCE)
    again = Workspace.from_env(tmp_path / "other").store
    assert again.find("release", "k") == again.version(ref.digest) and again.moves("release") == [move]
    assert directory_digest(again.get(ref))[0] == ref.digest and again.gc().paths == ()


GROWTH = """
import resource, sys
from pathlib import Path
from infra.stores.lakefs import LakeFSStore, prepare
from infra.stores.lakefs_server import open_server
store = LakeFSStore(open_server("onereward"), Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
store.get(store.put("onnx", Path(sys.argv[2])))
print(peak() - before)
"""


@pytest.mark.parametrize("presign", [False, True])
def test_memory_does_not_grow_with_a_file(lakefs: LakeFS, tmp_path: Path, presign: bool) -> None:
    """100 MB up and down again: what the process held at its peak grows by less than half of that."""
    lakefs.presign = lakefs.multipart = presign
    folder = folder_with(tmp_path / "a", x="1")
    with (folder / "big").open("wb") as file:
        file.truncate(100_000_000)
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "cache"), str(folder)]
    done = subprocess.run(command, env=os.environ | lakefs.environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000  # KB
