"""Another team's taste: do labels that ask for what the base judge has never been told make another policy?

    python -m benchmarks.ablations --arms 'taste/*'

The base judge has been trained on the annotator's own measures, so that a policy gets better does not show that the labels taught it
anything. Here one dimension is labelled by a taste instead, the mean chroma of what was made (`max - min` of RGB), once by one who likes
more of it and once by one who likes less. Candidates, the other dimensions' labels, settings and seeds are the same, so what the judges
and the policies of the two differ in they have from these labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation_world import World
from models.device import default_device
from models.judge import Judge
from models.mini.measures import MEASURES, inside
from models.records import Pair, read_rows
from models.taxonomy import Taxonomy
from ops.evaluate import EvaluateConfig
from ops.judge_accuracy import judge_accuracy
from ops.policy_config import TrainPolicyConfig
from ops.statistics import clustered_mean
from ops.win_rates import BASE, ITEMS, duels, read_items

DIMENSION = "aesthetics"  # ours: the one that is a matter of taste
COUNTED = "vivid"  # what edits are counted by, whatever was liked


def _vivid(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    return inside(image.amax(0, keepdim=True) - image.amin(0, keepdim=True), mask)


def _muted(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    return -_vivid(image, target, mask, truth, prompt)


TASTES = {"vivid": _vivid, "muted": _muted}


@contextmanager
def tastes() -> Iterator[None]:
    """Meanwhile a taxonomy may name a taste as the measure that the annotator labels by."""
    MEASURES.update(TASTES)
    try:
        yield
    finally:
        for name in TASTES:
            del MEASURES[name]


def labelled_by(taxonomy: Taxonomy, taste: str) -> Taxonomy:
    """The taxonomy with `DIMENSION` a matter of this taste. The questions to the judge stay."""
    changed = (row.model_copy(update={"labelled_by": taste}) if row.name == DIMENSION else row for row in taxonomy.dimensions)
    return taxonomy.model_copy(update={"dimensions": tuple(changed)})


@dataclass(frozen=True)
class TasteArm:
    """A judge fitted to labels of a taste, and the policy that it rewards."""

    says: str
    likes: str | None = None  # None: the shipped measure

    def measure(self, world: World) -> dict[str, Any]:
        """How often edits are more vivid than the base's, how often they win by the acceptance measures, and what the judge learned."""
        with tastes(), world.draft() as draft:
            policy, edits = draft / "policy", draft / "evaluation"
            policy.mkdir()
            edits.mkdir()
            pairs, judge = self._judge(world, draft)
            right = {"judge": _agreement(world, judge, pairs), "base_judge": _agreement(world, world.base_judge, pairs)}
            trained = world.train(world.config(TrainPolicyConfig, "policy"), judge, policy, world.taxonomy)
            found = world.evaluate(policy, edits, labelled_by(world.taxonomy, COUNTED))
            vivid = _counted(edits, world.config(EvaluateConfig, "evaluation"))
        tasks = [
            {"task": row["task"], "n": row["n"], "win_rate": row["confirming_win_rate"]}
            for row in found["cells"]
            if row["dimension"] == DIMENSION
        ]
        kept = ("n", "mean_win_rate", "mean_lo", "mean_hi")
        return {**vivid, "tasks": tasks, **right, "accepted": {name: found[name] for name in kept}, "rewarded": trained["rewarded"]}

    def _judge(self, world: World, draft: Path) -> tuple[Path, Path]:
        """Folders of the pairs and of the judge that was fitted to them."""
        if self.likes is None:
            return world.pairs, world.reward_model
        pairs, judge = draft / "pairs", draft / "reward_model"
        pairs.mkdir()
        judge.mkdir()
        world.label(labelled_by(world.taxonomy, self.likes), pairs)
        world.fit(pairs, judge)
        return pairs, judge


def _agreement(world: World, folder: Path, pairs: Path) -> dict[str, Any]:
    """A judge's accuracy on the sealed pairs of `DIMENSION`, mean over tasks."""
    config = world.fitting
    judge = Judge.load(folder, world.taxonomy, getattr(torch, config.dtype))
    judge.model.to(default_device())
    asked = [pair for pair in read_rows(pairs / "pairs.jsonl", Pair) if pair.split == "test" and pair.dimension == DIMENSION]
    settings: dict[str, Any] = {"batch_size": config.batch_size, "progress": world.progress, "paste_source": config.paste_source}
    found = judge_accuracy(judge, world.taxonomy, asked, world.curated, world.candidates, **settings)
    return {name: found[name] for name in ("mean_accuracy", "lo", "hi", "n")}


def _counted(edits: Path, config: EvaluateConfig) -> dict[str, Any]:
    """Share of the policy's edits that are more vivid than the base's from the same noise, ties half, mean over tasks."""
    fought = duels(read_items(edits / ITEMS), "policy", BASE, config.tie_tolerance)
    rows = [duel for duel in fought if duel.dimension == DIMENSION and duel.confirming is not None]
    values, origins, tasks = ([getattr(duel, name) for duel in rows] for name in ("confirming", "origin", "task"))
    found = clustered_mean(values, origins, [tasks], confidence=config.confidence, resamples=config.resamples)
    return {"mean_win_rate": found.mean, "mean_lo": found.lo, "mean_hi": found.hi, "n": found.n}
