"""Three sabotages of the whole chain at toy size: each ends at its gate, which says why, and production stays where it is.

Every test starts from a copy of a home in which a toy release is in production. One op's output is tampered with behind its
back, and its stage gets another configuration, so that it is made anew; what comes before it is reused.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from infra.workspace import HOME_VARIABLE, Workspace
from models.records import Condition, Pair, read_rows, write_rows
from pipelines.chain_run import Outcome, run_chain
from pipelines.config import load_settings
from tests.pipelines.test_chain import ARTIFACTS
from tests.pipelines.toy import write_toy

pytestmark = pytest.mark.chain
OP = Callable[..., dict[str, Any]]


def run(home: Path, folder: Path, weights: Path, **sections: Any) -> Outcome:
    """The toy chain at `home`, through its Dagster job."""
    folder.mkdir(exist_ok=True)
    settings = load_settings(str(write_toy(folder, weights, **sections)))
    with pytest.MonkeyPatch.context() as patched, dg.instance_for_test(temp_dir=str(folder)) as instance:
        patched.setenv(HOME_VARIABLE, str(home))
        return run_chain(settings, instance)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A home with a toy release in production."""
    folder = tmp_path_factory.mktemp("released")
    outcome = run(folder / "home", folder, tiny_weights)
    assert outcome.ending == "promoted", outcome.message
    return folder / "home"


@pytest.fixture
def sabotaged(released: Path, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """`sabotaged(op, tamper, **sections)` runs the chain with `tamper(out)` after an op; afterwards production is as it was."""
    home = tmp_path / "home"
    shutil.copytree(released, home, symlinks=True)
    before = Workspace.from_env(released).store
    assert before.stage("release", "production") is not None

    def call(op: str, tamper: Callable[[Path], None], **sections: Any) -> Outcome:
        module, name = op.rsplit(".", 1)
        original: OP = getattr(__import__(module, fromlist=[name]), name)
        tampered: list[Path] = []

        def wrapped(*arguments: Any, **named: Any) -> dict[str, Any]:
            metrics = original(*arguments, **named)
            out = next(each for each in arguments if isinstance(each, Path) and each.parent == home / "tmp")
            tamper(out)
            tampered.append(out)
            return metrics

        monkeypatch.setattr(op, wrapped)
        outcome = run(home, tmp_path / "run", tiny_weights, **sections)
        assert tampered, outcome  # and not reused
        return outcome

    yield call
    after = Workspace.from_env(home).store
    assert after.moves("release") == before.moves("release")
    assert after.stage("release", "production") == before.stage("release", "production")
    assert after.versions("release") == before.versions("release")


def refused(outcome: Outcome, gate: str) -> bool:
    """Whether the run ended at a gate, the only ones that failed being of that name."""
    return outcome.ending == "refused" and {row["name"] for row in outcome.gates if not row["passed"]} == {gate}


def test_a_source_in_two_splits_ends_at_split_leak(sabotaged: Callable[..., Outcome]) -> None:
    leaked: list[str] = []

    def leak(out: Path) -> None:
        rows = read_rows(out / "conditions.jsonl", Condition)
        trained = next(row for row in rows if row.split == "train")
        tested = next(row for row in rows if row.split == "test")
        leaked.append(trained.source_id)
        write_rows(
            out / "conditions.jsonl",
            [row.model_copy(update={"source_id": trained.source_id}) if row is tested else row for row in rows],
        )

    outcome = sabotaged("assets.curated_dataset.curate", leak, curated_dataset={"seed": 1})
    assert refused(outcome, "split_leak"), outcome
    assert outcome.message.startswith("curated_dataset: ") and "split_leak: measured 1," in outcome.message
    assert leaked[0] in outcome.message
    assert set(outcome.artifacts) == {"source_images", "curated_dataset"}


def test_a_judge_of_shuffled_labels_ends_at_judge_accuracy(sabotaged: Callable[..., Outcome]) -> None:
    """Under the shipped threshold. A judge of this size stays near one half whatever it is told, so this shows where such a
    judge ends, and not that a good one would have passed."""

    def shuffle(out: Path) -> None:
        rows, coin = read_rows(out / "pairs.jsonl", Pair), random.Random(0)
        swapped = [row.model_copy(update={"winner": row.loser, "loser": row.winner}) for row in rows]
        write_rows(out / "pairs.jsonl", [coin.choice(both) for both in zip(rows, swapped, strict=True)])

    outcome = sabotaged(
        "assets.preference_pairs.make_pairs",
        shuffle,
        preference_pairs={"drop_contradictions": False},
        gates={"min_judge_accuracy": 0.6},
    )
    assert refused(outcome, "judge_accuracy"), outcome
    assert outcome.message.startswith("reward_model: ") and "judge_accuracy: measured" in outcome.message
    assert set(outcome.artifacts) == {
        "source_images",
        "curated_dataset",
        "candidates",
        "preferences",
        "preference_pairs",
        "reward_model",
    }


def test_a_cut_onnx_file_ends_at_onnx_valid(sabotaged: Callable[..., Outcome]) -> None:
    def cut(out: Path) -> None:
        path = out / "transformer.onnx"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    outcome = sabotaged("assets.onnx.export_onnx", cut, onnx={"seed": 1})
    assert refused(outcome, "onnx_valid"), outcome
    assert outcome.message.startswith("onnx: ") and "transformer.onnx is not a usable ONNX file" in outcome.message
    assert set(outcome.artifacts) == ARTIFACTS - {"engine", "release"}
