"""The arms of `python -m benchmarks.ablations`: what each changes, and what is measured of it.

    ARMS["policy/cap_0.9"].measure(world)     # the figures of one arm on one seed

To add an arm is to add a line to `ARMS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.ablation_world import World, beside_source
from benchmarks.perfect_judge import PerfectlyJudged, spread
from benchmarks.pointwise import PointwiseJudge
from benchmarks.taste import TASTES, TasteArm
from models.device import default_device
from models.judge import Judge
from models.records import Candidate, read_rows
from models.taxonomy import Taxonomy
from ops.fit_reward import fit_reward
from ops.policy_config import TrainPolicyConfig

LORA_RATE = 10  # ours: LoRA's learning rate over that of full fine-tuning


def shipped(taxonomy: Taxonomy) -> Taxonomy:
    return taxonomy


def worded(**query: str) -> Callable[[Taxonomy], Taxonomy]:
    """The taxonomy with another query. The mini judge has met no other words than the shipped query's."""
    return lambda taxonomy: taxonomy.model_copy(update={"query_template": taxonomy.query_template.model_copy(update=query)})


def only(dimension: str) -> Callable[[Taxonomy], Taxonomy]:
    """The taxonomy with one dimension, of the tasks that are judged on it."""

    def restricted(taxonomy: Taxonomy) -> Taxonomy:
        tasks = [task.model_copy(update={"dimensions": (dimension,)}) for task in taxonomy.tasks if dimension in task.dimensions]
        return taxonomy.model_copy(update={"tasks": tuple(tasks)})

    return restricted


@dataclass(frozen=True)
class JudgeArm:
    """A judge fitted to the training pairs and asked about the test pairs."""

    says: str
    taxonomy: Callable[[Taxonomy], Taxonomy] = shipped
    judge_class: type[Judge] = Judge
    paste_source: bool = True
    source_beside: bool = False  # show source and mask too
    default: bool = False  # the judge that rewards the policies

    def measure(self, world: World) -> dict[str, Any]:
        """Accuracy on the test pairs, over all and per cell, order consistency, and accuracy where both are one-step predictions."""
        taxonomy = self.taxonomy(world.taxonomy)
        with world.draft() as draft:
            shown = world.base_judge, world.curated, world.candidates
            if self.source_beside:
                shown = beside_source(world, draft)
            config = world.fitting.model_copy(update={"paste_source": self.paste_source and not self.source_beside})
            if self.default:
                folder = world.reward_model
            else:
                folder = draft / "reward_model"
                folder.mkdir()
                fit_reward(config, *shown, world.pairs, folder, world.progress, taxonomy, self.judge_class)
            judge = self.judge_class.load(folder, taxonomy, getattr(torch, config.dtype))
            judge.model.to(default_device())
            asked = partial(world.accuracy, judge, config=config, shown=shown[1:])
            found = asked(world.test_pairs)
            stops = {row.id: row.stop for row in read_rows(world.candidates / "candidates.jsonl", Candidate)}
            early = [pair for pair in world.test_pairs if stops[pair.winner] is not None and stops[pair.loser] is not None]
            one_step = asked(early)["mean_accuracy"] if early else None
        kept = ("mean_accuracy", "lo", "hi", "order_consistency", "n", "cells")
        return {**{name: found[name] for name in kept}, "one_step": one_step, "n_one_step": len(early)}


@dataclass(frozen=True)
class PolicyArm:
    """A policy trained on the default judge or on another, and compared with the base on the test conditions."""

    says: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the preset's TrainPolicyConfig
    taxonomy: Callable[[Taxonomy], Taxonomy] = shipped  # in training; everything is evaluated as always
    mode: str = "static"
    rate: float = 1.0  # times the preset's learning rate
    unlabelled: bool = False  # rewarded by the base judge, in the cells that the fitted one may reward
    perfect: bool = False  # rewarded by a judge that knows the perfect edit, in the place of the fitted one

    def measure(self, world: World) -> dict[str, Any]:
        """Win rates over the base by the acceptance measures, mean, per task and per cell, by the annotator's and by the judge."""
        config = world.config(TrainPolicyConfig, "policy", **self.changes)
        config = config.model_copy(update={"learning_rate": config.learning_rate * self.rate})
        make_trainer = None
        if self.perfect:
            make_trainer = partial(PerfectlyJudged, spread(world.curated, world.candidates, world.taxonomy, world.progress))
        with world.draft() as draft:
            policy, edits = draft / "policy", draft / "evaluation"
            policy.mkdir()
            edits.mkdir()
            judge = world.reward_model
            if self.unlabelled:
                judge = draft / "unlabelled"
                shutil.copytree(world.base_judge, judge / "model")
                shutil.copy(world.reward_model / "metrics.json", judge)  # by which the cells are chosen
            trained = world.train(config, judge, policy, self.taxonomy(world.taxonomy), self.mode, make_trainer)
            found = world.evaluate(policy, edits, world.taxonomy)
        kept = (
            "n",
            "mean_win_rate",
            "mean_lo",
            "mean_hi",
            "confirming_mean_win_rate",
            "judge_mean_win_rate",
            "preservation_psnr",
            "base_preservation_psnr",
        )
        cell = ("task", "dimension", "n", "win_rate", "lo", "hi")
        return {
            **{name: found[name] for name in kept},
            "tasks": [{name: row[name] for name in ("task", "n", "win_rate", "lo", "hi")} for row in found["tasks"]],
            "cells": [{name: row[name] for name in cell} for row in found["cells"]],
            "rewarded": trained["rewarded"],
        }


# What the other arms of a kind are held against.
DEFAULTS = {"judge": "judge/default", "policy": "policy/static", "taste": "taste/muted"}

ARMS: dict[str, JudgeArm | PolicyArm | TasteArm] = {
    "judge/default": JudgeArm(
        "pairwise and generative, edits pasted into their source, the shipped query, as the preset fits it", default=True
    ),
    "judge/pointwise": JudgeArm(
        "a Bradley-Terry head: each edit is scored alone by the same answer head, log P(Yes) / P(No) against an even grey picture, and the "
        "difference of two scores is the log-odds (benchmarks/pointwise.py)",
        judge_class=PointwiseJudge,
    ),
    "judge/terse_query": JudgeArm(
        "query wording: names of task and dimension, the prompt where the dimension reads it, no sentence",
        worded(template="{task_title}: {dimension_title}?{prompt_clause}"),
    ),
    "judge/no_prompt": JudgeArm(
        "query wording: text alignment and legibility are asked about without the prompt", worded(prompt_clause="")
    ),
    "judge/source_and_mask": JudgeArm("each edit is shown above its source, in which the mask is tinted", source_beside=True),
    "judge/not_pasted": JudgeArm("edits are shown as they were sampled, outside the mask too (the paper's way)", paste_source=False),
    "policy/static": PolicyArm("Algorithm 1, as the preset trains it"),
    "policy/ema": PolicyArm("Algorithm 2: the reference follows the policy", mode="ema"),
    **{f"policy/cap_{cap}": PolicyArm(f"cap lambda {cap}", {"cap": cap}) for cap in (0.5, 0.55, 0.9)},
    **{
        f"policy/stop_{low}_{high}": PolicyArm(f"stop steps {low} to {high}", {"stop_low": low, "stop_high": high})
        for low, high in ((1, 2), (3, 4), (6, 7))
    },
    **{
        f"policy/only_{dimension}": PolicyArm(
            f"{dimension.replace('_', ' ')} alone is rewarded, on the tasks that have it", {}, only(dimension)
        )
        for dimension in ("structure", "consistency", "text_alignment", "aesthetics")
    },
    "policy/lora_16": PolicyArm(f"LoRA of rank 16, learning rate times {LORA_RATE}", {"lora_rank": 16}, rate=LORA_RATE),
    "policy/temperature_1": PolicyArm("the judge's own temperature, 1", {"temperature": 1.0}),
    "policy/fixed_shares": PolicyArm("tasks take turns by p_k alone, however many comparisons are won", {"difficulty_window": 0}),
    "policy/one_view": PolicyArm("the judge sees each pair once, where it lies: no jitter", {"jitter": 0, "views": 1}),
    "policy/equal_weights": PolicyArm("every dimension weighs 1, as in the paper", {"by_shortfall": False}),
    "policy/two_noises": PolicyArm("reference and policy start from two noises, as in the paper", {"same_noise": False}),
    "policy/base_judge": PolicyArm(
        "rewarded by the base judge, which no label has taught, in the cells that the fitted one may reward", unlabelled=True
    ),
    "policy/perfect_judge": PolicyArm(
        "rewarded in every cell by a judge that knows the perfect edit and answers by the annotator's own measures "
        "(benchmarks/perfect_judge.py), at cap 0.9, temperature 1 and one view; no photographs, of which no perfect edit is known",
        {"cap": 0.9, "temperature": 1.0, "jitter": 0, "views": 1, "least_judged": 0.0},
        perfect=True,
    ),
    "policy/perfect_judge_same_cells": PolicyArm(
        "the same in those cells alone in which the fitted judge may reward",
        {"cap": 0.9, "temperature": 1.0, "jitter": 0, "views": 1},
        perfect=True,
    ),
    "taste/as_shipped": TasteArm("labels by the shipped measure: what the policy of `policy/static` does that nobody asked for"),
    **{f"taste/{name}": TasteArm(f"labels of one who finds the {name} edit the more pleasing", name) for name in TASTES},
}
