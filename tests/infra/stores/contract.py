"""What every artifact store must do, whatever keeps its bytes. A store's test file subclasses `StoreContract`:

class TestDvc(StoreContract):
    @pytest.fixture
    def store(self, tmp_path): return DvcStore(tmp_path / "registry")
    def reopen(self, store): return DvcStore(store.root)
    def damage(self, store, content, how): ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.stores.base import ArtifactRef, ArtifactStore, FileChange, StageMove, directory_digest
from models.errors import DigestMismatch, GateRefused, StoreError, UnknownVersion


def folder_with(folder: Path, **files: str | bytes) -> Path:
    """`folder`/data, its files with the given contents beside one that is the same in every folder."""
    for name, content in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "data" / "sub").mkdir(exist_ok=True)
    (folder / "data" / "sub" / "same").write_text("in every version")
    return folder / "data"


class StoreContract:
    """Subclass it with a `store` fixture that gives an empty store, and the two methods below."""

    def reopen(self, store: Any) -> ArtifactStore:
        """The same store as another process would open it."""
        raise NotImplementedError

    def damage(self, store: Any, content: bytes, how: str) -> None:
        """Alter or remove (`how`) every stored object with that content, in all places the store keeps it."""
        raise NotImplementedError

    def test_what_is_put_is_got_and_recorded(self, store: ArtifactStore, tmp_path: Path) -> None:
        parent = store.put("source_images", folder_with(tmp_path / "s", a="1"), key="k0")
        folder = folder_with(tmp_path / "c", a="1", b="2")
        ref = store.put(
            "curated_dataset", folder, key="k1", parents=[parent], run_id="run-1", code_version="c1", config={"size": 64}, metadata={"n": 3}
        )
        assert (ref.digest, ref.size) == directory_digest(folder) == directory_digest(store.get(ref))
        version = self.reopen(store).version(ref.digest[:8])
        assert version.ref == ref and version.number == 1 and version.parents == (parent,)
        assert (version.run_id, version.code_version, version.config, version.metadata) == ("run-1", "c1", {"size": 64}, {"n": 3})
        assert store.find("curated_dataset", "k1") == version
        assert store.find("curated_dataset", "k0") is None and store.find("curated_dataset", "") is None
        assert str(tmp_path) not in ref.uri
        assert [v.ref for v in store.versions()] == [parent, ref]

    def test_equal_work_is_stored_once(self, store: ArtifactStore, tmp_path: Path) -> None:
        folder = folder_with(tmp_path / "a", x="1")
        first = store.put("onnx", folder, key="k")
        assert store.put("onnx", folder, key="k") == first
        assert self.reopen(store).put("onnx", folder_with(tmp_path / "copy", x="1"), key="k") == first
        assert [v.number for v in store.versions("onnx")] == [1]
        store.put("onnx", folder, key="other")  # the same bytes by other means are a version of their own
        (folder / "x").write_text("2")
        third = store.put("onnx", folder, key="k")
        assert [v.number for v in store.versions("onnx")] == [1, 2, 3]
        assert store.find("onnx", "k") == store.version(third.digest)
        assert (store.get(first) / "x").read_text() == "1" and (store.get(third) / "x").read_text() == "2"

    def test_a_figure_that_is_not_finite_is_kept_for_the_gate_to_judge(self, store: ArtifactStore, tmp_path: Path) -> None:
        ref = store.put("onnx", folder_with(tmp_path / "a", x="1"), metadata={"error": float("nan")})
        assert math.isnan(self.reopen(store).version(ref.digest).metadata["error"])

    def test_the_folder_that_was_put_stays_the_callers(self, store: ArtifactStore, tmp_path: Path) -> None:
        folder = folder_with(tmp_path / "a", x="1")
        ref = store.put("onnx", folder)
        (folder / "x").write_text("changed after the put")
        assert (store.get(ref) / "x").read_text() == "1"

    def test_files_handed_out_are_read_only(self, store: ArtifactStore, tmp_path: Path) -> None:
        got = store.get(store.put("onnx", folder_with(tmp_path / "a", x="1", empty="")))
        assert {p.stat().st_mode & 0o777 for p in got.rglob("*") if p.is_file()} == {0o444}

    def test_a_lost_or_changed_copy_is_made_again(self, store: ArtifactStore, tmp_path: Path) -> None:
        ref = store.put("onnx", folder_with(tmp_path / "a", x="1"))
        got = store.get(ref)
        (got / "x").unlink()
        (got / "extra").write_text("not part of it")
        assert directory_digest(store.get(ref))[0] == ref.digest

    @pytest.mark.parametrize("damage", ["altered", "removed"])
    def test_damaged_bytes_are_told_and_never_handed_out(self, store: ArtifactStore, tmp_path: Path, damage: str) -> None:
        ref = store.put("onnx", folder_with(tmp_path / "a", x="1" * 100))
        (store.get(ref) / "x").unlink()
        self.damage(store, b"1" * 100, damage)
        with pytest.raises(DigestMismatch, match="onnx 1"):
            self.reopen(store).get(ref)

    def test_bytes_that_were_lost_come_back_with_the_same_content(self, store: ArtifactStore, tmp_path: Path) -> None:
        folder = folder_with(tmp_path / "a", x="1" * 100)
        ref = store.put("onnx", folder)
        (store.get(ref) / "x").unlink()
        self.damage(store, b"1" * 100, "removed")
        assert self.reopen(store).put("onnx", folder) == ref
        assert directory_digest(store.get(ref))[0] == ref.digest and len(store.versions()) == 1

    def test_a_difference_is_told_by_path_and_size(self, store: ArtifactStore, tmp_path: Path) -> None:
        one = store.put("onnx", folder_with(tmp_path / "1", gone="12", kept="1", other="abc", resized="1"))
        two = store.put("onnx", folder_with(tmp_path / "2", kept="1", new="123", other="abd", resized="12"))
        expected = [
            FileChange("gone", "removed", 2, None),
            FileChange("new", "added", None, 3),
            FileChange("other", "changed", 3, 3),
            FileChange("resized", "changed", 1, 2),
        ]
        self.damage(store, b"123", "removed")  # what is not there is not needed
        assert self.reopen(store).diff(one, two) == expected and store.diff(one, one) == []
        with pytest.raises(UnknownVersion):
            store.diff(one, ArtifactRef("onnx", "f" * 64, "", 0))

    def test_nothing_that_is_stored_is_collected(self, store: ArtifactStore, tmp_path: Path) -> None:
        one, two = (store.put("onnx", folder_with(tmp_path / str(n), x=str(n)), run_id="r") for n in (1, 2))
        store.assign(one, "production", approver="me", reason="r")
        assert store.gc(dry_run=True).paths == ()
        report = store.gc(dry_run=False)
        assert (report.paths, report.bytes, report.dry_run) == ((), 0, False)
        assert [directory_digest(self.reopen(store).get(ref))[0] for ref in (one, two)] == [one.digest, two.digest]

    def test_lineage_names_children_before_parents_each_once(self, store: ArtifactStore, tmp_path: Path) -> None:
        a = store.put("aa", folder_with(tmp_path / "a", x="a"))
        b = store.put("bb", folder_with(tmp_path / "b", x="b"), parents=[a])
        c = store.put("cc", folder_with(tmp_path / "c", x="c"), parents=[a])
        d = store.put("dd", folder_with(tmp_path / "d", x="d"), parents=[b, c, a])
        names = [v.ref.name for v in store.lineage(d.digest)]
        assert sorted(names) == ["aa", "bb", "cc", "dd"] and names[0] == "dd" and names[-1] == "aa"
        again = store.put("aa", folder_with(tmp_path / "a", x="a"), key="made from dd", parents=[d])  # the same bytes, from a child
        assert again.digest == a.digest
        assert [(v.ref.name, v.number) for v in store.lineage(a.digest)][::4] == [("aa", 2), ("aa", 1)]

    def test_unknown_things_are_named(self, store: ArtifactStore, tmp_path: Path) -> None:
        folder = folder_with(tmp_path / "a", x="1")
        ref = store.put("onnx", folder)
        stranger = ArtifactRef("onnx", "f" * 64, "", 0)
        with pytest.raises(UnknownVersion, match="ffffffffffff"):
            store.get(stranger)
        with pytest.raises(UnknownVersion):
            store.put("engine", folder, parents=[stranger])
        with pytest.raises(UnknownVersion):
            store.version(ref.digest[:7])
        with pytest.raises(UnknownVersion):
            store.assign(stranger, "production", approver="a", reason="r")
        assert store.stage("onnx", "production") is None and store.versions("engine") == []

    @pytest.mark.parametrize("name", ["../onnx", "on/nx", "", "Onnx", "a b", "-a"])
    def test_a_name_cannot_leave_its_place(self, store: ArtifactStore, tmp_path: Path, name: str) -> None:
        with pytest.raises(StoreError):
            store.put(name, folder_with(tmp_path / "a", x="1"))
        assert store.versions() == []

    @pytest.mark.parametrize(("name", "digest"), [("../onnx", "f" * 64), ("onnx", "../../outside"), ("onnx", "/etc")])
    def test_a_reference_cannot_leave_its_place(self, store: ArtifactStore, tmp_path: Path, name: str, digest: str) -> None:
        store.put("onnx", folder_with(tmp_path / "a", x="1"))
        with pytest.raises(StoreError):
            store.get(ArtifactRef(name, digest, "", 0))

    def test_unusable_folders_are_refused(self, store: ArtifactStore, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        linked = folder_with(tmp_path / "linked", x="1")
        (linked / "link").symlink_to(linked / "x")
        for folder in (tmp_path / "empty", tmp_path / "absent", linked, linked / "x"):
            with pytest.raises(StoreError):
                store.put("onnx", folder)
        with pytest.raises(StoreError):
            store.put("onnx", folder_with(tmp_path / "good", x="1"), metadata={"not json": object()})
        assert store.versions() == []

    def test_a_move_is_kept_as_it_was_sealed(self, store: ArtifactStore, tmp_path: Path) -> None:
        """The seal sees every earlier move of the name; where it refuses, nothing moves."""
        ref = store.put("release", folder_with(tmp_path / "a", x="1"))
        first = store.assign(ref, "staging", approver="me", reason="r")
        seen: list[StageMove] = []

        def seal(moves: Sequence[StageMove], move: StageMove) -> StageMove:
            seen.extend(moves)
            return dataclasses.replace(move, previous="p" * 64, signature="s")

        sealed = store.assign(ref, "production", approver="me", reason="r", seal=seal)
        assert seen == [first] and (sealed.previous, sealed.signature) == ("p" * 64, "s")
        assert self.reopen(store).moves("release") == [first, sealed]

        def refuse(moves: Sequence[StageMove], move: StageMove) -> StageMove:
            raise GateRefused("No.", "Never.")

        with pytest.raises(GateRefused):
            store.assign(ref, "production", approver="me", reason="r", seal=refuse)
        assert self.reopen(store).moves("release") == [first, sealed]

    def test_a_label_never_moves(self, store: ArtifactStore, tmp_path: Path) -> None:
        first, second = (store.put("policy", folder_with(tmp_path / text, a=text)) for text in ("one", "two"))
        assert store.tags("policy") == {}
        store.tag(first, "spring")
        store.tag(first, "spring")
        store.tag(second, "summer")
        with pytest.raises(StoreError, match="Labels never move"):
            store.tag(second, "spring")
        with pytest.raises(StoreError):
            store.tag(first, "../up")
        assert store.tags("policy") == {"spring": first, "summer": second}
        assert store.moves("policy") == []

    def test_stages_follow_the_highest_counter_within_one_second(self, store: ArtifactStore, tmp_path: Path) -> None:
        one, two = (store.put("release", folder_with(tmp_path / str(n), x=str(n))) for n in (1, 2))
        path = [one, two, one, two, one]
        moves = [store.assign(ref, "production", approver="me", reason=f"move {i}", evidence=["e" * 64]) for i, ref in enumerate(path)]
        store.assign(two, "staging", approver="me", reason="try")
        assert [m.counter for m in moves] == [1, 2, 3, 4, 5]
        assert store.moves("release", "production") == moves
        assert len(store.moves("release")) == 6
        assert store.stage("release", "production") == one and store.stage("release", "staging") == two
        assert self.reopen(store).stage("release", "production") == one
