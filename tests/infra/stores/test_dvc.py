"""The DVC registry: real git, real DVC, small files."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import gto.api
import pygit2
import pytest
from dvc.repo import Repo

from infra.progress import Progress
from infra.stores.base import directory_digest
from infra.stores.content import copy_hashed
from infra.stores.dvc import DvcStore
from models.errors import DiskFull, StoreError
from tests.infra.stores.contract import StoreContract, folder_with


@pytest.fixture
def store(tmp_path: Path) -> DvcStore:
    return DvcStore(tmp_path / "registry")


class TestDvcStore(StoreContract):
    def reopen(self, store: DvcStore) -> DvcStore:
        return DvcStore(store.root)

    def damage(self, store: DvcStore, content: bytes, how: str) -> None:
        for path in (store.root / ".dvc" / "cache" / "files").rglob("*"):
            if path.is_file() and path.read_bytes() == content:
                path.chmod(0o644)
                path.write_bytes(b"2" * len(content)) if how == "altered" else path.unlink()
                if path.exists():
                    path.chmod(0o444)


def state_of(store: DvcStore) -> dict[str, bytes]:
    """Everything that counts in the registry: records, DVC files, working copies, cache objects, refs."""
    kept = ["records", "manifests", "artifacts", "dvc.yaml", ".dvc/cache", ".git/refs", ".dvc/config"]
    paths = [p for top in kept for p in (store.root / top).rglob("*") if p.is_file()]
    return {str(p.relative_to(store.root)): p.read_bytes() for p in paths}


def versions_of(store: DvcStore) -> dict[str, bytes]:
    """The same without the cache: a put that was cut short leaves objects for the next try."""
    return {path: content for path, content in state_of(store).items() if not path.startswith(".dvc/cache")}


def assert_clean(store: DvcStore) -> None:
    assert pygit2.Repository(str(store.root)).status() == {}
    assert not (store.root / ".pending").exists()
    with Repo(str(store.root)) as repo:
        assert repo.status() == {}


def commits(store: DvcStore) -> list[str]:
    repo = pygit2.Repository(str(store.root))
    return [commit.message for commit in repo.walk(repo.head.target)]


def test_one_commit_a_version_with_everything_about_it(store: DvcStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1")
    store.put("onnx", folder, key="k", config={"size": 64})
    before = state_of(store)
    store.put("onnx", folder, key="k", config={"size": 64})
    assert state_of(store) == before
    with pytest.raises(StoreError):
        store.put("onnx", folder, metadata={"not json": object()})
    assert state_of(store) == before
    second = store.put("onnx", folder, key="other")
    log = commits(store)
    assert len(log) == 3 and log[0].startswith("onnx 2: ") and second.digest in log[0]
    config_digest = hashlib.sha256(b'{"size": 64}').hexdigest()
    assert f"\nConfig digest: {config_digest}\n" in log[1]
    assert_clean(store)


def test_gto_reads_the_tags(store: DvcStore, tmp_path: Path) -> None:
    store.put("release", folder_with(tmp_path / "0", x="0"))
    ref = store.put("release", folder_with(tmp_path / "1", x="1"))
    store.assign(ref, "production", approver="me", reason="r")
    (shown,) = gto.api.find_versions_in_stage(str(store.root), "release", "production")
    assert shown.version == "v1.0.2"
    assert store.root.name == "registry" and shown.commit_hexsha == store.history.introduced("records/release/000002.json")


def test_a_foreign_tag_is_told(store: DvcStore, tmp_path: Path) -> None:
    ref = store.put("release", folder_with(tmp_path / "1", x="1"))
    store.assign(ref, "production", approver="me", reason="r")
    store.history.tag("release#production#2", store.history.introduced("records/release/000001.json"), "by hand")
    with pytest.raises(StoreError, match="release#production#2"):
        store.stage("release", "production")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_store_as_it_was(small_disk: Path, tmp_path: Path) -> None:
    store = DvcStore(small_disk / "registry")
    first = store.put("onnx", folder_with(tmp_path / "a", x=os.urandom(200_000)))
    before = state_of(store)
    big = folder_with(tmp_path / "b", **{f"x{i}": os.urandom(500_000) for i in range(8)})
    with pytest.raises(DiskFull, match="onnx"):
        store.put("onnx", big, parents=[first])
    with pytest.raises(DiskFull, match="engine"):
        store.put("engine", big, parents=[first])
    assert state_of(store) == before
    assert_clean(store)
    store.put("onnx", folder_with(tmp_path / "c", x=os.urandom(200_000)))
    assert directory_digest(store.get(first))[0] == first.digest


@pytest.mark.parametrize("left", [0, 4096])
def test_a_stage_on_a_full_disk_stays_where_it_is(small_disk: Path, tmp_path: Path, left: int) -> None:
    """Also where git's library does not say why it could not write."""
    store = DvcStore(small_disk / "registry")
    ref = store.put("release", folder_with(tmp_path / "a", x="1"))
    space = os.statvfs(small_disk)
    with (small_disk / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, space.f_bavail * space.f_frsize - left)
    with pytest.raises(DiskFull, match="point production at release"):
        store.assign(ref, "production", approver="me", reason="r")
    (small_disk / "ballast").unlink()
    assert DvcStore(store.root).moves("release") == []
    store.assign(ref, "production", approver="me", reason="r")
    assert_clean(store)


def test_a_file_size_limit_is_a_full_disk(store: DvcStore, tmp_path: Path) -> None:
    store.put("onnx", folder_with(tmp_path / "a", x="1"))
    before = state_of(store)
    big = folder_with(tmp_path / "b", x=os.urandom(2_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskFull) as caught:
            store.put("onnx", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__ is not None and state_of(store) == before
    assert_clean(store)
    assert store.put("onnx", big).size > 2_000_000


def test_a_writer_that_ends_while_the_store_is_opened_leaves_nothing_to_repair(
    store: DvcStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.pending` was there when looked for, and is gone by the time the lock is free."""
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
    pending = store.root / ".pending"
    pending.write_text("onnx")

    class WriterEnds(filelock.FileLock):
        def acquire(self, *args, **kwargs):
            pending.unlink(missing_ok=True)
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr("infra.stores.dvc.filelock.FileLock", WriterEnds)
    assert DvcStore(store.root).version(ref.digest).ref == ref


KILLED = """
import os, pathlib, signal, sys
from infra.stores import dvc
store = dvc.DvcStore(pathlib.Path(sys.argv[1]))
commit = store.history.commit
def die(*arguments):
    if sys.argv[3] == "after": commit(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
store.history.commit = die
store.put("onnx", pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("moment", "versions"), [("before", 1), ("after", 2)])
def test_a_killed_writer_leaves_all_or_nothing(store: DvcStore, tmp_path: Path, moment: str, versions: int) -> None:
    store.put("onnx", folder_with(tmp_path / "a", x="1"))
    before = versions_of(store)
    folder = folder_with(tmp_path / "b", x="2")
    script = subprocess.run([sys.executable, "-c", KILLED, str(store.root), str(folder), moment], cwd=Path(__file__).parents[3])
    assert script.returncode == -signal.SIGKILL and (store.root / ".pending").exists()
    if moment == "after":  # killed when the commit was made and its record not yet in the working tree
        (store.root / "records" / "onnx" / "000002.json").unlink()
    again = DvcStore(store.root)
    assert len(again.versions()) == versions
    if moment == "before":
        assert versions_of(store) == before
    assert_clean(store)
    ref = again.put("onnx", folder)
    assert len(again.versions()) == 2 and directory_digest(again.get(ref))[0] == ref.digest


def test_ctrl_c_in_the_middle_leaves_the_store_as_it_was(store: DvcStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("onnx", folder_with(tmp_path / "a", x="1"))
    before = versions_of(store)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.history, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put("engine", folder_with(tmp_path / "b", x="2"))
    assert versions_of(store) == before
    assert_clean(store)


def test_a_creation_cut_short_is_begun_again(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    (root / ".dvc").mkdir(parents=True)
    pygit2.init_repository(str(root))
    DvcStore(root).put("onnx", folder_with(tmp_path / "a", x="1"))
    assert_clean(DvcStore(root))


def test_another_git_repository_is_not_taken_over(tmp_path: Path) -> None:
    store = DvcStore(tmp_path / "registry")
    (store.root / ".dvc" / "config").unlink()
    with pytest.raises(StoreError, match="no registry"):
        DvcStore(store.root)


def test_a_held_lock_is_waited_for_and_then_told(store: DvcStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1")
    hurried = DvcStore(store.root, lock_timeout=0.2)
    with filelock.FileLock(store.root / ".lock"):
        with pytest.raises(StoreError, match="locked"):
            hurried.put("onnx", folder)
        writer = threading.Thread(target=store.put, args=("onnx", folder))
        writer.start()
        time.sleep(0.1)
        assert store.versions() == []  # reading waits for nobody
    writer.join()
    assert len(store.versions()) == 1


def test_eight_writers_in_processes_of_their_own_lose_nothing(store: DvcStore, tmp_path: Path) -> None:
    code = "import pathlib, sys; from infra.stores.dvc import *; DvcStore(Path(sys.argv[1])).put(sys.argv[3], Path(sys.argv[2]))"
    folders = [folder_with(tmp_path / str(n), x=str(n // 2)) for n in range(8)]  # every content twice
    root = Path(__file__).parents[3]
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(store.root), str(folder), ("onnx", "engine")[n % 4 // 2]], cwd=root)
        for n, folder in enumerate(folders)
    ]
    assert [writer.wait(300) for writer in writers] == [0] * 8
    assert [v.number for name in ("onnx", "engine") for v in store.versions(name)] == [1, 2, 1, 2] and len(commits(store)) == 5
    assert {v.ref.digest for v in store.versions()} == {directory_digest(folder)[0] for folder in folders}
    for version in store.versions():
        assert directory_digest(store.get(version.ref))[0] == version.ref.digest
    assert_clean(store)
    assert store.gc().paths == ()


def test_a_broken_record_is_told(store: DvcStore, tmp_path: Path) -> None:
    store.put("onnx", folder_with(tmp_path / "a", x="1"))
    path = store.root / "records" / "onnx" / "000001.json"
    path.write_text(json.dumps({"ref": {}}))
    with pytest.raises(StoreError, match=r"000001\.json"):
        store.versions()


def test_an_unwritable_home_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        DvcStore(tmp_path / "file" / "registry")
    cause = caught.value.__cause__
    assert isinstance(cause, OSError) and cause.errno == errno.ENOTDIR


CUT = """
import os, pathlib, signal, sys
from infra.stores import content, dvc, incoming
copy, left = content.copy_hashed, [2]
def cut(source, *rest):
    left[0] -= 1
    if left[0] < 0:
        rest[0].write_bytes(source.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(source, *rest)
incoming.copy_hashed = cut
incoming.in_parallel = lambda work, items, meter: [work(item) for item in items]
dvc.DvcStore(pathlib.Path(sys.argv[1])).put("onnx", pathlib.Path(sys.argv[2]), run_id="run-1")
"""


@pytest.fixture
def cut_short(store: DvcStore, tmp_path: Path) -> Path:
    """A folder whose put was killed in the middle of its third file."""
    folder = folder_with(tmp_path / "a", **{f"x{i}": os.urandom(50_000) for i in range(5)})
    time.sleep(0.2)  # files that were changed just now are read again
    script = subprocess.run([sys.executable, "-c", CUT, str(store.root), str(folder)], cwd=Path(__file__).parents[3])
    assert script.returncode == -signal.SIGKILL
    return folder


def test_a_put_cut_short_goes_on_where_it_was(store: DvcStore, cut_short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def copy(source: Path, *rest: Any) -> tuple[str, str]:
        copied.append(source.name)
        return copy_hashed(source, *rest)

    monkeypatch.setattr("infra.stores.incoming.copy_hashed", copy)
    assert store.versions() == []
    ref = store.put("onnx", cut_short)
    assert len(copied) == 4 and directory_digest(store.get(ref))[0] == directory_digest(cut_short)[0]  # six files, two were done
    assert list((store.root / ".work" / "incoming").rglob("*.part")) == []
    store.gc(dry_run=False)
    assert store.gc().paths == () and directory_digest(store.get(ref))[0] == ref.digest
    assert_clean(store)


def test_what_a_put_left_is_collected_unless_its_run_goes_on(store: DvcStore, cut_short: Path, tmp_path: Path) -> None:
    kept = store.put("onnx", folder_with(tmp_path / "b", x="1"))
    assert store.gc(live=["run-1"]).paths == ()
    told = store.gc()
    assert (
        told.dry_run and sum(path.startswith(".dvc/cache/files/md5/") for path in told.paths) == 1
    )  # the other one has been put meanwhile
    assert all((store.root / path).exists() for path in told.paths)
    assert told.bytes == sum((store.root / path).stat().st_size for path in told.paths) > 50_000
    done = store.gc(dry_run=False)
    assert done.paths == told.paths and not any((store.root / path).exists() for path in done.paths)
    assert directory_digest(store.get(kept))[0] == kept.digest and store.gc().paths == ()


def test_what_is_collected_during_a_put_is_brought_again(store: DvcStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another put, of the same bytes, fails for lack of space and takes back what it had brought."""

    def lost(*_: Any) -> None:
        for path in (store.root / ".dvc" / "cache" / "files").rglob("*"):
            if path.is_file():
                path.unlink()

    monkeypatch.setattr(DvcStore, "_upload", lost)
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
    monkeypatch.undo()
    assert directory_digest(store.get(ref))[0] == ref.digest
    assert_clean(store)


def test_a_changed_file_is_read_again_even_where_its_size_and_time_say_nothing(store: DvcStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1")
    time.sleep(0.2)
    first = store.put("onnx", folder)
    before = (folder / "x").stat()
    with (folder / "x").open("r+") as file:
        file.write("2")
    os.utime(folder / "x", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = store.put("onnx", folder)
    assert second.digest == directory_digest(folder)[0] != first.digest


def test_a_folder_that_changes_while_it_is_stored_is_refused(store: DvcStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "a", x="1")

    def copy(source: Path, *rest: Any) -> tuple[str, str]:
        (folder / "late").write_text("added")
        return copy_hashed(source, *rest)

    monkeypatch.setattr("infra.stores.incoming.copy_hashed", copy)
    with pytest.raises(StoreError, match="changed while"):
        store.put("onnx", folder)
    assert store.versions() == []


def test_a_large_file_is_never_held_whole(store: DvcStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1")
    with (folder / "large").open("wb") as file:
        file.truncate(64 * 2**20)
    lines: list[str] = []
    tracemalloc.start()
    try:
        ref = store.put("onnx", folder, progress=Progress(lines.append))
        store.get(ref)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20 and lines[-1].startswith("store onnx: 100%")


def test_dvcs_own_commands_read_what_is_written(store: DvcStore, tmp_path: Path) -> None:
    from dvc.cli import main

    refs = [store.put("release", folder_with(tmp_path / str(n), x=str(n), sub_file=f"{n}" * 10)) for n in range(3)]
    for ref in (refs[0], refs[1], refs[0]):  # a rollback, all within a second
        store.assign(ref, "production", approver="me", reason="r")
    url = str(store.root)
    for arguments, expected in (
        (["get", url, "artifacts/release"], 2),
        (["get", url, "artifacts/release", "--rev", "release@v1.0.2"], 1),
        (["artifacts", "get", url, "release", "--rev", "v1.0.2"], 1),
        (["artifacts", "get", url, "release", "--stage", "production"], 0),
    ):
        out = tmp_path / "-".join(arguments[-1:]).replace("/", "-")
        assert main([*arguments, "-o", str(out), "-q"]) == 0, arguments
        assert directory_digest(out)[0] == refs[expected].digest
        shutil.rmtree(out)
