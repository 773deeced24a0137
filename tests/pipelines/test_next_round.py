"""`onereward run --next-round`: the chain once more, on what is in production."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from infra.data import weights_digest
from infra.workspace import Workspace
from models.records import Candidate, Condition, read_rows
from ops.fit_reward import fit_reward
from ops.folders import read_metrics
from ops.lineage import trained_with
from pipelines.config import load_settings
from pipelines.next_round import next_round
from tests.pipelines.conftest import Command, Finished

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
SMALL_STEP = 1e-5  # a hundredth of the first round's: what starts from its release stays close to it


def farthest(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    before, after = load_file(one), load_file(other)
    return max(float((before[name].double() - after[name].double()).abs().max()) for name in before)


def test_without_production_there_is_no_next_round(onereward: Command, toy: Callable[..., Path]) -> None:
    code, _, err = onereward("run", "--next-round", "--preset", str(toy()))
    assert code == 1 and err.count("\n") == 1 and "No release is in production" in err and "`onereward run`" in err


@pytest.mark.chain
def test_a_round_goes_on_from_production_and_replaces_it_only_when_not_below(
    onereward: Command, home: Path, toy: Callable[..., Path], finished: Finished, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.from_env(finished.copy(home))
    store = workspace.store
    first = store.stage("release", "production")
    assert first is not None
    starts: list[Path] = []
    labelled: list[tuple[Path, ...]] = []

    def fit(config: Any, start: Path, *rest: Any, earlier: list[tuple[Path, Path, Path]]) -> dict[str, Any]:
        starts.append(start)
        labelled.extend(earlier)
        return fit_reward(config, start, *rest, earlier=earlier)

    monkeypatch.setattr("assets.reward_model.fit_reward", fit)
    gentle = {"policy": {"learning_rate": SMALL_STEP}}
    strict = str(toy(**gentle, gates={"min_production_lo": 1.0}))
    code, out, err = onereward("run", "--next-round", "--preset", strict)
    assert code == 0 and "refused: evaluation" in out and "not_below_production" in out, out + err
    assert store.stage("release", "production") == first

    code, out, err = onereward("run", "--next-round", "--preset", str(toy(**gentle)))
    assert code == 0 and "promoted: release v2" in out and "reused evaluation v2" in out, out + err
    made = {name: store.versions(name)[-1] for name in ("candidates", "reward_model", "policy-static", "policy-ema", "evaluation")}
    assert all(version.number == 2 and first in version.parents for version in made.values())
    rounds = [read_rows(store.get(version.ref) / "conditions.jsonl", Condition) for version in store.versions("curated_dataset")]
    (seen, photos), (now, again) = ([{row.origin for row in rows if row.kind == kind} for kind in ("scene", "photo")] for rows in rounds)
    assert seen and now and not seen & now and again and again <= photos  # the sealed scenes are new, and so are all others

    pipeline = store.get(first) / "model"
    rows = read_rows(store.get(made["candidates"].ref) / "candidates.jsonl", Candidate)
    sampled = {weights_digest(folder, home / "digests.json") for folder in (pipeline, tiny_weights / "flux")}
    assert {row.model_digest for row in rows} == sampled  # the judge is to tell the release's from the base's
    judge = trained_with(store, first, "reward_model")
    assert starts == [tiny_weights / "judge"]
    assert labelled == [tuple(store.get(store.versions(name)[0].ref) for name in ("curated_dataset", "candidates", "preference_pairs"))]
    one, two = (read_metrics(store.get(version.ref)) for version in store.versions("reward_model"))
    assert one["pairs_earlier"] == 0 and two["pairs_earlier"] == one["pairs_train"] < two["pairs_train"]
    assert judge in {version.ref for version in store.lineage(made["reward_model"].ref.digest)}
    for mode in ("static", "ema"):
        trained = store.get(made[f"policy-{mode}"].ref) / WEIGHTS
        assert 0 < farthest(trained, pipeline / WEIGHTS) < 10 * SMALL_STEP < farthest(trained, tiny_weights / "flux" / WEIGHTS)
    assert set(read_metrics(store.get(made["evaluation"].ref))["against_production"]) == {"static", "ema"}

    assert onereward("verify")[0] == 0
    report = workspace.reports / "3"
    told = json.loads((report / "report.json").read_text())["starts"]
    assert told == [{"version": 1, "digest": first.digest, "made": ["candidates", "reward_model", "policy-static", "policy-ema"]}]
    assert re.search(
        r"A further round on release v1 .*: candidates, reward_model, policy-static, policy-ema\.", (report / "report.html").read_text()
    )


@pytest.mark.chain
def test_a_round_keeps_the_splits_that_production_was_trained_on(finished: Finished, toy: Callable[..., Path]) -> None:
    turned = load_settings(str(toy(curated_dataset={"rotation": 3})))
    store = Workspace(finished.home).store
    stages = next_round(turned, store).stages
    assert stages["curated_dataset"]["rotation"] == 0
    assert stages["source_images"]["first_scene"] == store.versions("source_images")[0].config["n_scenes"] > 0
    own = load_settings(str(toy(source_images={"path": "pictures"})))
    assert "first_scene" not in next_round(own, store).stages["source_images"]  # a user's pictures stay where they were
