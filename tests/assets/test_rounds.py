"""Which releases another goes on from, and the splits that must not mix."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from assets.common import Work
from assets.policy import policy
from assets.rounds import labelled_before, rounds, starting_release
from assets.settings import Settings
from infra.progress import Progress
from infra.stores.base import ArtifactRef
from infra.stores.dvc import DvcStore
from infra.workspace import Workspace
from models.errors import ConfigError
from models.records import SPLITS, Condition, write_rows
from models.taxonomy import Taxonomy
from ops.policy_config import TrainPolicyConfig
from tests.ops.promotable import put


def curated(store: DvcStore, folder: Path, *origins: str) -> ArtifactRef:
    """A dataset of one source image for training, validation and test each, in that order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [
        Condition(id=origin, source_id=origin, task="fill", prompt="", split=split, kind="scene")
        for origin, split in zip(origins, SPLITS, strict=True)
    ]
    write_rows(folder / "conditions.jsonl", rows)
    return store.put("curated_dataset", folder)


def released(store: DvcStore, folder: Path, data: ArtifactRef, note: str, start: ArtifactRef | None = None) -> ArtifactRef:
    """A release whose judge and policy were trained on `data`, from `start`."""
    above = [start] if start else []
    judge = put(store, folder, "reward_model", [data, *above], note=note)
    tuned = put(store, folder, "policy-ema", [data, judge, *above], note=note)
    return put(store, folder, "release", [tuned], note=note)


def work(store: DvcStore, data: ArtifactRef, start: ArtifactRef) -> Work:
    home = store.root.parent
    return Work(
        stage=policy,
        config=TrainPolicyConfig(start=start.digest),
        settings=Settings(preset="test", flux="none", judge="none"),
        workspace=Workspace(home),
        store=store,
        taxonomy=Taxonomy.load(),
        progress=Progress(),
        refs={"curated_dataset": data},
        out=home,
        scratch=home,
        run_id="run",
        mode="ema",
    )


def test_a_start_that_was_trained_on_the_test_is_refused_through_all_rounds(tmp_path: Path) -> None:
    store, folder = DvcStore(tmp_path / "registry"), tmp_path / "work"
    data = curated(store, folder, "a", "b", "c")
    first = released(store, folder, data, "one")
    assert rounds(store, first) == [first]
    assert starting_release(work(store, data, first)) == first

    turned = curated(store, folder, "c", "d", "a")
    with pytest.raises(ConfigError, match=r"Release v1, .*policy-ema .* 1 source images of the test, such as a.*rotation"):
        starting_release(work(store, turned, first))

    other = curated(store, folder, "e", "f", "c")  # its test is that of the first round
    second = released(store, folder, other, "two", first)
    assert rounds(store, second) == [second, first]
    assert starting_release(work(store, other, second)) == second
    with pytest.raises(ConfigError, match="such as a"):
        starting_release(work(store, curated(store, folder, "g", "h", "a"), second))


def test_a_judge_is_fitted_to_the_newest_labels_of_every_candidates_behind_it(tmp_path: Path) -> None:
    store, folder = DvcStore(tmp_path / "registry"), tmp_path / "work"
    data = curated(store, folder, "a", "b", "c")

    def labelled(candidates: ArtifactRef, note: str) -> tuple[ArtifactRef, ArtifactRef, ArtifactRef]:
        return data, candidates, put(store, folder, "preference_pairs", [data, candidates], note=note)

    def release(made: tuple[ArtifactRef, ...], note: str, *above: ArtifactRef) -> ArtifactRef:
        judge = put(store, folder, "reward_model", [*made, *above], note=note)
        return put(store, folder, "release", [put(store, folder, "policy-ema", [data, judge, *above], note=note)], note=note)

    of_base, of_first = (put(store, folder, "candidates", [data], note=note) for note in ("base", "first"))
    one = labelled(of_base, "one")
    first = release(one, "one")
    two = labelled(of_first, "two")
    second = release(two, "two", first)
    again = labelled(of_first, "two, labelled again")
    third = release(again, "three", second)

    def before(start: ArtifactRef, candidates: ArtifactRef) -> list[tuple[ArtifactRef, ...]]:
        present = work(store, data, start)
        return labelled_before(replace(present, refs={**present.refs, "candidates": candidates}), start)

    fresh = put(store, folder, "candidates", [data], note="third")
    assert before(first, of_first) == [one]
    assert before(second, fresh) == [two, one]
    assert before(third, fresh) == [again, one]  # overturned labels do not come back
    assert before(second, of_first) == [one]  # and none of these candidates are fitted to twice
