"""Another team's taste: does a policy do what labels ask for, where they ask for something of their own?

    python -m benchmarks.ablations --arms 'taste/*'

The base judge has been trained on the annotator's own measures, so that a policy gets better does not show that the labels taught it
anything. Here one dimension is labelled by a taste instead, the mean chroma of what was made (`max - min` of RGB), once by one who likes
more of it and once by one who likes less. Candidates, settings, seeds and all other labels are the same, down to which labels err and which
are ties: what the policies of the two differ in they have from these labels. It is counted by the very formula that labelled, as the
question is whether labels are followed and not whether edits get better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation_world import World
from models.device import default_device
from models.errors import ConfigError
from models.judge import Judge
from models.mini.measures import MEASURES, inside
from models.records import Pair, read_rows
from models.taxonomy import Taxonomy
from ops.evaluate import EvaluateConfig
from ops.policy_config import TrainPolicyConfig
from ops.statistics import clustered_mean
from ops.win_rates import BASE, ITEMS, Item, duels, read_items

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
        """How often edits are more vivid than the base's, how often they win by the acceptance measures, and what the judge learned.

        Raises ConfigError for a preset whose evidence is blind: the taste is counted in the place of the annotator's measure.
        """
        evaluation = world.config(EvaluateConfig, "evaluation")
        if evaluation.evidence != "ground_truth":
            raise ConfigError("A taste cannot be counted under blind evidence.", "Use a preset with `evidence: ground_truth`.")
        with tastes(), world.draft() as draft:
            policy, edits = draft / "policy", draft / "evaluation"
            policy.mkdir()
            edits.mkdir()
            pairs, judge = self._judge(world, draft)
            right = {"judge": _agreement(world, judge, pairs), "base_judge": _agreement(world, world.base_judge, pairs)}
            trained = world.train(world.config(TrainPolicyConfig, "policy"), judge, policy, world.taxonomy)
            found = world.evaluate(policy, edits, labelled_by(world.taxonomy, COUNTED))
            vivid = counted(read_items(edits / ITEMS), evaluation)
        accepted = {name: found[name] for name in ("n", "mean_win_rate", "mean_lo", "mean_hi")}
        return {**vivid, **right, "accepted": accepted, "rewarded": trained["rewarded"]}

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
    judge = Judge.load(folder, world.taxonomy, getattr(torch, world.fitting.dtype))
    judge.model.to(default_device())
    asked = [pair for pair in read_rows(pairs / "pairs.jsonl", Pair) if pair.split == "test" and pair.dimension == DIMENSION]
    found = world.accuracy(judge, asked, config=world.fitting, shown=(world.curated, world.candidates))
    return {name: found[name] for name in ("mean_accuracy", "lo", "hi", "n")}


def counted(items: Sequence[Item], config: EvaluateConfig) -> dict[str, Any]:
    """Share of the policy's edits that are more vivid than the base's from the same noise, ties half: by task, and the mean over tasks.

    Args:
        items: records of an evaluation under `labelled_by(taxonomy, COUNTED)`. Photographs, which it does not measure, are left out; of
            nothing else the figures are None.
    """
    tested = [item for item in items if item["split"] == config.split]
    rows = [duel for duel in duels(tested, "policy", BASE, config.tie_tolerance) if duel.dimension == DIMENSION]
    known = [(duel.task, duel.origin, duel.confirming) for duel in rows if duel.confirming is not None]
    if not known:
        return {"more_vivid": None, "lo": None, "hi": None, "n": 0, "tasks": []}
    tasks, origins, values = zip(*known, strict=True)
    found = clustered_mean(values, origins, [tasks], confidence=config.confidence, resamples=config.resamples)
    by_task = {name: [value for task, _, value in known if task == name] for name in dict.fromkeys(tasks)}
    shares = [{"task": name, "n": len(won), "more_vivid": fmean(won)} for name, won in by_task.items()]
    return {"more_vivid": found.mean, "lo": found.lo, "hi": found.hi, "n": found.n, "tasks": shares}
