"""The audit log over random histories and under every way of tampering, in a real registry."""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pygit2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.signing import Keys
from infra.stores.base import ArtifactRef, directory_digest
from infra.stores.dvc import DvcStore
from models.errors import AuditBroken, GateRefused, SignatureRefused, StoreError, UnknownVersion
from ops.audit import append, verify_chain
from ops.gate import SIGNATURE
from ops.promote import STAGES, rollback

BY = {"approver": "kim", "reason": "test"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ArtifactRef]]:
    """A home with three signed releases that no stage points to."""
    home = tmp_path_factory.mktemp("template")
    store, keys = DvcStore(home / "registry"), Keys(home / "keys")
    refs = []
    for number in range(3):
        folder = home / str(number)
        folder.mkdir()
        (folder / "weights").write_text(str(number))
        refs.append(store.put("release", folder, metadata={SIGNATURE: keys.sign_folder(folder)}))
        store.get(refs[-1])
    return home, refs


@pytest.fixture
def home(template: tuple[Path, list[ArtifactRef]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(template[0], tmp_path / "home"))


def opened(home: Path) -> tuple[DvcStore, Keys]:
    return DvcStore(home / "registry"), Keys(home / "keys")


@pytest.fixture
def moved(home: Path, template: tuple[Path, list[ArtifactRef]]) -> Path:
    """Four entries: 1, 2, 3 and 1 again in production."""
    store, keys = opened(home)
    for ref in (*template[1], template[1][0]):
        append(store, keys, ref, "production", **BY)
    verify_chain("release", store.moves("release"), keys)
    return home


Action = tuple[str, str, int]  # promote or rollback, stage, release
ACTIONS = st.lists(st.tuples(st.sampled_from(["promote", "promote", "rollback"]), st.sampled_from(STAGES), st.integers(0, 2)), max_size=12)


@settings(max_examples=12, deadline=None)
@given(actions=ACTIONS)
def test_stages_and_log_are_right_after_any_history(template: tuple[Path, list[ArtifactRef]], actions: list[Action]) -> None:
    """The model: a stage is a stack. A move to what lies in it goes back there, any other is put on top, a rollback takes one off."""
    refs = template[1]
    stacks: dict[str, list[int]] = {stage: [] for stage in STAGES}
    done = 0
    with tempfile.TemporaryDirectory() as temporary:
        store, keys = opened(Path(shutil.copytree(template[0], Path(temporary) / "home")))
        for verb, stage, number in actions:
            stack = stacks[stage]
            if verb == "promote":
                append(store, keys, refs[number], stage, **BY)
                stacks[stage] = [*stack[: stack.index(number)], number] if number in stack else [*stack, number]
            elif len(stack) < 2:
                with pytest.raises(UnknownVersion):
                    rollback(store, keys, "release", stage, **BY)
                continue
            else:
                rollback(store, keys, "release", stage, **BY)
                stack.pop()
            done += 1
        moves = store.moves("release")
        assert [move.counter for move in moves] == list(range(1, done + 1))
        verify_chain("release", moves, keys)
        for stage, stack in stacks.items():
            ref = store.stage("release", stage)
            assert ref == (refs[stack[-1]] if stack else None)
            assert ref is None or directory_digest(store.get(ref))[0] == ref.digest


def rewrite(home: Path, number: int, message: str | None) -> None:
    """Replace the tag of an entry by one with another message, or remove it."""
    repo = pygit2.Repository(str(home / "registry"))
    name = f"release#production#{number}"
    tag = repo[repo.references[f"refs/tags/{name}"].target]
    repo.references.delete(f"refs/tags/{name}")
    if message is not None:
        repo.create_tag(name, tag.target, pygit2.enums.ObjectType.COMMIT, pygit2.Signature("x", "x@localhost"), message)


def message(home: Path, number: int) -> dict[str, object]:
    repo = pygit2.Repository(str(home / "registry"))
    return json.loads(repo[repo.references[f"refs/tags/release#production#{number}"].target].message)


def broken(home: Path) -> str:
    store, keys = opened(home)
    with pytest.raises(AuditBroken) as raised:
        verify_chain("release", store.moves("release"), keys)
    with pytest.raises(AuditBroken):  # and nothing is moved on it
        append(store, keys, store.versions("release")[0].ref, "production", **BY)
    return raised.value.what


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("field", ["reason", "digest", "previous", "when", "signature"])
def test_an_edited_entry_is_named(moved: Path, number: int, field: str) -> None:
    rewrite(moved, number, json.dumps(message(moved, number) | {field: "f" * 64}))
    assert f"Entry {number} of the audit log of release" in broken(moved)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_removed_entry_is_named_the_newest_too(moved: Path, number: int) -> None:
    rewrite(moved, number, None)
    assert f"Entry {number} of the audit log of release" in broken(moved)


def test_reordered_entries_are_named(moved: Path) -> None:
    second, third = message(moved, 2), message(moved, 3)
    rewrite(moved, 2, json.dumps(third | {"counter": 2}))
    rewrite(moved, 3, json.dumps(second | {"counter": 3}))
    assert "Entry 2 of" in broken(moved)


def test_a_log_made_anew_without_the_key_is_refused(moved: Path, tmp_path: Path) -> None:
    """Every link is right, and the entries are signed: by a key that is not trusted."""
    store, _ = opened(moved)
    forger = Keys(tmp_path / "forger")
    for number in (1, 2, 3, 4):
        rewrite(moved, number, None)
    for _ in range(4):
        append(store, forger, store.versions("release")[1].ref, "production", **BY)
    assert "Entry 1 of" in broken(moved)
    (moved / "keys" / "head-release.json").unlink()
    assert "Entry 1 of" in broken(moved)


def test_the_head_may_lag_behind_and_may_not_be_lost(moved: Path) -> None:
    store, keys = opened(moved)
    head = moved / "keys" / "head-release.json"
    earlier = head.read_text()
    move = append(store, keys, store.versions("release")[1].ref, "production", **BY)
    head.write_text(earlier)  # as a writer leaves it that was killed before it kept the head
    verify_chain("release", store.moves("release"), keys)
    assert append(store, keys, store.versions("release")[2].ref, "production", **BY).counter == move.counter + 1
    assert json.loads(head.read_text())["counter"] == move.counter + 1
    head.write_text(head.read_text().replace('"counter": 6', '"counter": 5'))
    assert "is not signed" in broken(moved)
    head.unlink()
    assert "holds no head" in broken(moved)


def test_a_head_that_cannot_be_written_is_told_as_a_move_that_was_made(moved: Path) -> None:
    store, keys = opened(moved)
    (moved / "keys" / "head-release.draft.json").mkdir()
    with pytest.raises(StoreError, match=r"production of release has moved to v2.*Do not repeat a rollback"):
        append(store, keys, store.versions("release")[1].ref, "production", **BY)
    (moved / "keys" / "head-release.draft.json").rmdir()
    verify_chain("release", store.moves("release"), keys)
    assert store.stage("release", "production") == store.versions("release")[1].ref


def test_what_is_not_allowed_or_cannot_be_signed_leaves_no_entry(moved: Path) -> None:
    store, keys = opened(moved)
    ref, before = store.versions("release")[1].ref, store.moves("release")

    def no(moves: object) -> None:
        raise GateRefused("No.", "Never.")

    with pytest.raises(GateRefused):
        append(store, keys, ref, "production", **BY, allowed=no)
    keys.private.unlink()
    with pytest.raises(SignatureRefused):
        append(store, keys, ref, "production", **BY)
    assert store.moves("release") == before == DvcStore(store.root).moves("release")


def test_promoters_that_race_make_one_chain(moved: Path) -> None:
    refs = [version.ref for version in opened(moved)[0].versions("release")]

    def go(number: int) -> int:
        store, keys = opened(moved)
        return append(store, keys, refs[number % 3], STAGES[number % 3], **BY).counter

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(go, range(6))) == [5, 6, 7, 8, 9, 10]
    store, keys = opened(moved)
    verify_chain("release", store.moves("release"), keys)
    assert json.loads((moved / "keys" / "head-release.json").read_text())["counter"] == 10
