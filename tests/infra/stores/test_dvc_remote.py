"""The DVC registry with a remote: a folder, and an S3-compatible server on the loopback address."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.stores.base import directory_digest
from infra.stores.content import UNSETTLED_NS
from infra.stores.dvc import DvcStore
from infra.workspace import STORE_VARIABLE, Workspace
from models.errors import ConfigError, DigestMismatch, OneRewardError, ServerUnreachable, StoreError
from tests.infra.stores.contract import StoreContract, folder_with

SECRET = "planted-secret-0123456789"


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "files" / "md5").glob("??/*") if path.is_file())


def damage_in(folder: Path, content: bytes, how: str) -> None:
    for path in objects(folder):
        if path.read_bytes() == content:
            path.chmod(0o644)
            path.write_bytes(b"2" * len(content)) if how == "altered" else path.unlink()


def cache_of(store: DvcStore) -> Path:
    return store.root / ".dvc" / "cache"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def store(tmp_path: Path, remote: Path) -> DvcStore:
    return DvcStore(tmp_path / "registry", remote=str(remote))


class TestDvcStoreWithRemote(StoreContract):
    def reopen(self, store: DvcStore) -> DvcStore:
        assert store.remote is not None
        return DvcStore(store.root, remote=store.remote.url)

    def damage(self, store: DvcStore, content: bytes, how: str) -> None:
        assert store.remote is not None
        damage_in(cache_of(store), content, how)
        damage_in(Path(store.remote.url), content, how)


@pytest.mark.parametrize("how", ["altered", "removed"])
def test_what_the_cache_lost_is_fetched(store: DvcStore, tmp_path: Path, how: str) -> None:
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1" * 100))
    assert directory_digest(store.get(ref))[0] == ref.digest
    damage_in(cache_of(store), b"1" * 100, how)
    (store.root / "checkouts" / ref.digest / "x").unlink()
    assert directory_digest(store.get(ref))[0] == ref.digest
    shutil.rmtree(store.root / "checkouts")
    shutil.rmtree(cache_of(store))
    assert directory_digest(DvcStore(store.root, remote=str(tmp_path / "remote")).get(ref))[0] == ref.digest


def test_what_is_stored_already_may_be_put_again_after_the_cache_was_lost(store: DvcStore, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1" * 100)
    time.sleep(UNSETTLED_NS / 1e9)  # so that its hashes are remembered
    ref = store.put("onnx", folder)
    shutil.rmtree(cache_of(store))
    store.get(ref)  # brings the files back, and not their list
    assert store.put("onnx", folder) == ref and len(store.versions()) == 1


def test_bytes_altered_in_both_places_are_told(store: DvcStore, remote: Path, tmp_path: Path) -> None:
    ref = store.put("onnx", folder_with(tmp_path / "a", x="1" * 100))
    damage_in(remote, b"1" * 100, "altered")
    damage_in(cache_of(store), b"1" * 100, "removed")
    with pytest.raises(DigestMismatch, match="x of onnx 1"):
        store.get(ref)


def test_an_upload_that_was_cut_is_made_whole_by_the_next_put(store: DvcStore, remote: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", x="1" * 100)
    ref = store.put("onnx", folder)
    (cut,) = (path for path in objects(remote) if path.read_bytes() == b"1" * 100)
    cut.chmod(0o644)
    cut.write_bytes(b"1" * 50)
    assert store.put("onnx", folder) == ref and cut.read_bytes() == b"1" * 100


def test_dvc_pulls_from_the_same_place(store: DvcStore, tmp_path: Path) -> None:
    from dvc.repo import Repo

    ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
    shutil.rmtree(cache_of(store))
    shutil.rmtree(store.root / "artifacts" / "onnx")
    with Repo(str(store.root)) as repo:
        repo.pull()
    assert directory_digest(store.root / "artifacts" / "onnx")[0] == ref.digest


def test_a_remote_that_may_not_be_written_to_is_one_error(tmp_path: Path, remote: Path) -> None:
    remote.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(remote)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a read-only file system needs root: {done.stderr.strip()}")
    try:
        store = DvcStore(tmp_path / "registry", remote=str(remote))
        folder = folder_with(tmp_path / "a", x="1")
        with pytest.raises(StoreError, match="may not be read and written") as caught:
            store.put("onnx", folder)
        assert str(remote) in caught.value.what and store.versions() == []
        subprocess.run(["mount", "-o", "remount,rw", str(remote)], check=True)
        ref = store.put("onnx", folder)
        assert len(store.versions()) == 1 and directory_digest(store.get(ref))[0] == ref.digest
    finally:
        subprocess.run(["umount", "-l", str(remote)], check=True)


@pytest.mark.parametrize(
    "address", [f"s3://key:{SECRET}@bucket/a", f"s3://bucket/a?secret={SECRET}", "relative", "ftp://host/a", "s3:///a"]
)
def test_an_address_that_is_no_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(STORE_VARIABLE, f"dvc+{address}")
    with pytest.raises(ConfigError) as caught:
        Workspace.from_env(tmp_path).store.versions()
    assert SECRET not in str(caught.value)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a loopback server, and credentials in the environment."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("dvc_s3", reason="the extra s3 is not installed")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        (tmp_path / "aws").write_text("")  # whoever runs this may have credentials of their own
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
        boto3.client("s3").create_bucket(Bucket="models")
        yield "s3://models/onereward"
    finally:
        server.stop()


def test_a_bucket_keeps_what_is_put(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setenv(STORE_VARIABLE, f"dvc+{bucket}")
    store = Workspace.from_env(tmp_path / "home").store
    assert isinstance(store, DvcStore)
    folder = folder_with(tmp_path / "a", x="1", large=b"0123456789" * 10_000)
    ref = store.put("onnx", folder)
    listed = boto3.client("s3").list_objects_v2(Bucket="models", Prefix="onereward/")["Contents"]
    assert len(listed) == 4 and max(each["Size"] for each in listed) == 100_000  # three files and their list
    shutil.rmtree(cache_of(store))
    assert directory_digest(store.get(ref))[0] == ref.digest
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == []
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    (folder / "x").write_text("2")
    _refused(store, folder, StoreError, "credentials in the environment")


def test_a_bucket_that_is_not_there_and_a_server_that_does_not_answer(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "a", x="1")
    _refused(DvcStore(tmp_path / "other", remote="s3://absent/onereward"), folder, StoreError, "s3://absent/onereward")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _refused(DvcStore(tmp_path / "registry", remote=bucket), folder, ServerUnreachable, "does not answer")


def _refused(store: DvcStore, folder: Path, error: type[OneRewardError], match: str) -> None:
    """A put that fails for the remote's sake: one clear error without a secret, and no version."""
    before = store.versions()
    with pytest.raises(error, match=match) as caught:
        store.put("onnx", folder)
    assert SECRET not in str(caught.value) and store.versions() == before
