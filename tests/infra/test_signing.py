"""Keys and signatures: who may sign, and what no longer verifies."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from infra.signing import KEY_VARIABLE, Keys
from models.errors import DiskFull, SignatureRefused


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "home" / "keys")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "weights").write_bytes(b"1")
    (tmp_path / "model" / ".gitignore").write_text("x")
    return tmp_path / "model"


def test_a_home_without_keys_makes_its_own_for_its_owner_alone(keys: Keys, folder: Path) -> None:
    bundle = keys.sign_folder(folder)
    keys.verify_folder(folder, bundle, "model 1")
    assert keys.private == keys.folder / "signing.key" and keys.private.stat().st_mode & 0o777 == 0o600
    assert list(keys.trusted) == [keys.fingerprint]
    assert b"PRIVATE" not in next(iter(keys.trusted.values())).read_bytes()
    with pytest.raises(SignatureRefused, match="keys rotate"):
        keys.create()


@pytest.mark.parametrize(
    "alter",
    [
        lambda folder: (folder / "sub" / "weights").write_bytes(b"2"),
        lambda folder: (folder / ".gitignore").write_text("y"),
        lambda folder: (folder / "sub" / "more").write_bytes(b""),
        lambda folder: (folder / "sub" / "weights").unlink(),
    ],
    ids=["changed", "hidden file changed", "added", "removed"],
)
def test_a_folder_that_was_altered_is_refused(keys: Keys, folder: Path, alter: object) -> None:
    bundle = keys.sign_folder(folder)
    assert callable(alter)
    alter(folder)
    with pytest.raises(SignatureRefused, match="signature of model 1 does not hold"):
        keys.verify_folder(folder, bundle, "model 1")


def test_a_signature_of_a_stranger_is_refused(keys: Keys, folder: Path, tmp_path: Path) -> None:
    keys.create()
    stranger = Keys(tmp_path / "stranger" / "keys")
    with pytest.raises(SignatureRefused, match="not trusted here"):
        keys.verify_folder(folder, stranger.sign_folder(folder), "model 1")
    assert not keys.signed(b"text", stranger.sign(b"text")) and keys.signed(b"text", keys.sign(b"text"))
    for text, signature in ((b"other", keys.sign(b"text")), (b"text", ""), (b"text", f"{keys.fingerprint}:x")):
        assert not keys.signed(text, signature)
    path = next(iter(keys.trusted.values()))
    path.write_bytes(next(iter(stranger.trusted.values())).read_bytes())  # another key under the trusted one's name
    with pytest.raises(SignatureRefused):
        keys.verify_folder(folder, keys.sign_folder(folder), "model 1")


def test_public_keys_alone_verify_and_do_not_sign(keys: Keys, folder: Path, tmp_path: Path) -> None:
    bundle = keys.sign_folder(folder)
    consumer = Keys(tmp_path / "consumer" / "keys")
    shutil.copytree(keys.folder / "trusted", consumer.folder / "trusted")
    consumer.verify_folder(folder, bundle, "model 1")
    with pytest.raises(SignatureRefused, match="no usable signing key"):
        consumer.sign(b"text")
    assert not consumer.private.exists()  # a lost key is not replaced in silence


def test_the_key_may_lie_elsewhere(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Keys(tmp_path / "vault")
    other.create()
    monkeypatch.setenv(KEY_VARIABLE, str(other.folder / "signing.key"))
    assert keys.signed(b"text", keys.sign(b"text")) and not (keys.folder / "signing.key").exists()
    third = Keys(tmp_path / "third")
    third.folder.mkdir()
    monkeypatch.delenv(KEY_VARIABLE)
    third.create()
    monkeypatch.setenv(KEY_VARIABLE, str(other.folder / "signing.key"))
    with pytest.raises(SignatureRefused, match="does not trust the signing key"):
        third.sign(b"text")
    other.private.write_text("no key")
    with pytest.raises(SignatureRefused, match="no usable signing key"):
        keys.sign(b"text")


def test_after_rotation_old_signatures_hold_until_the_old_key_is_removed(keys: Keys, folder: Path) -> None:
    bundle = keys.sign_folder(folder)
    old, new = keys.rotate()
    assert old != new == keys.fingerprint
    keys.verify_folder(folder, bundle, "model 1")
    keys.trusted[old].unlink()
    with pytest.raises(SignatureRefused):
        keys.verify_folder(folder, bundle, "model 1")
    keys.verify_folder(folder, keys.sign_folder(folder), "model 1")


def test_a_full_disk_is_no_forgery(keys: Keys, folder: Path) -> None:
    bundle = keys.sign_folder(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(DiskFull, match="model 1"):
            keys.verify_folder(folder, bundle, "model 1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    keys.verify_folder(folder, bundle, "model 1")
