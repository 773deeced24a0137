"""What becomes of a policy while it is trained, and which of its checkpoints to deliver, without asking the truth.

    watch = Watch(sampler, base, judge, second, shards, conditions, taxonomy, settings={"steps": 8, ...}, ...)
    watch.look(policy, 20, progress, "step 20")     # adds to `watch.rows`, the lines of checkpoints.jsonl
    watch.best                                      # the step of the checkpoint to deliver

Validation conditions are edited by policy and base from the same noise. Two judges compare each pair in both orders: the one that rewards,
and a second one, fitted on labels of other source images, which the policy has never been trained against. Over-optimisation shows as the
first judge going on to prefer the policy more while the second comes to prefer it less (Gao et al., 2023, arXiv 2210.10760), or while a
measure that needs no target, in the dimensions that have a reliable one, finds the edits worse. A checkpoint of which the probe
(ops/probe.py) finds that is not delivered where there is another. Of the others it is the one with the largest score by the second judge:
the mean over tasks and dimensions of min(enough, mean P(Yes)), so that what is won in one cell does not make up for what is lost in
another, as with the cap of the reward. Where the perfect edit is known the acceptance measure's verdict is recorded beside them, for
hindsight and for the gate alone: no choice reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infra.progress import Progress
from models.adapters import Shadow
from models.blind import RELIABLE, Edit, blind
from models.flux_fill.sampler import Encoded, Sampler
from models.images import paste, to_mask, to_tensor
from models.judge import Judge
from models.mini.acceptance import accept
from models.records import Condition
from models.shards import ShardReader
from models.taxonomy import Task, Taxonomy
from ops.probe import Look, over_optimised
from ops.statistics import nested_mean, outcome
from ops.win_rates import SCENE, TIE_TOLERANCE, won


class Watch:
    """Edits of validation conditions by base and policy, compared as training goes on; `rows` holds what was seen, `over_optimised` the
    steps that are not delivered where there is another.

    Args:
        base: the weights that training started from.
        judge, second: the judge that rewards, and the one that does not (None where the reward model has none).
        settings: of `Sampler.sample`: steps, true_cfg, guidance_scale.
        pasted: show the judges edits pasted into their source, as they were fitted.
        enough: mean P(Yes) of a cell, above which it adds no more to a checkpoint's score.
    """

    def __init__(
        self,
        sampler: Sampler,
        base: Shadow,
        judge: Judge,
        second: Judge | None,
        shards: ShardReader,
        conditions: Sequence[Condition],
        taxonomy: Taxonomy,
        *,
        settings: dict[str, Any],
        negative_prompt: str,
        batch_size: int,
        pasted: bool,
        enough: float,
    ):
        self.sampler, self.base, self.judge, self.second = sampler, base, judge, second
        self.conditions, self.shards, self.taxonomy = conditions, shards, taxonomy
        self.settings, self.negative_prompt, self.pasted, self.enough = settings, negative_prompt, pasted, enough
        self.rows: list[Look] = []
        self.over_optimised: list[int] = []
        self._sources = [(to_tensor(shards[f"{c.id}.image"]), to_mask(shards[f"{c.id}.mask"])) for c in conditions]
        groups: dict[tuple[str, torch.Size], list[int]] = defaultdict(list)
        for place, condition in enumerate(conditions):
            groups[condition.task, self._sources[place][0].shape].append(place)
        self._batches = [places[i : i + batch_size] for places in groups.values() for i in range(0, len(places), batch_size)]
        self._before: dict[int, Tensor] = {}  # the base's edits, [3, H, W]
        self._scores: dict[tuple[int, str], float] = {}  # and what they measure, by the measure's name

    @torch.no_grad()
    def look(self, policy: nn.Module, step: int, progress: Progress, label: str) -> None:
        """Compare the weights now in `policy` with the base, and add the rows of `step`."""
        with progress.bar(label, len(self.conditions), "condition") as bar:
            for places in self._batches:
                images, masks = (torch.stack(parts) for parts in zip(*(self._sources[place] for place in places), strict=True))
                encoded = self._encode(images, masks, places)
                # the seed is the condition's place, so that base and policy start from one noise
                after = self.sampler.sample(policy, encoded, places, **self.settings).cpu()
                if places[0] not in self._before:
                    with self.base.applied():
                        before = self.sampler.sample(policy, encoded, places, **self.settings).cpu()
                    self._before |= zip(places, before, strict=True)
                before = torch.stack([self._before[place] for place in places])
                pasted = paste(images, after, masks), paste(images, before, masks)
                self._add(step, places, pasted if self.pasted else (after, before), pasted)
                bar.advance(len(places))
        if over_optimised(self.rows, step):
            self.over_optimised.append(step)

    def _encode(self, images: Tensor, masks: Tensor, places: Sequence[int]) -> Encoded:
        prompts, device = [self.conditions[place].prompt for place in places], self.sampler.pipe.device
        negatives = [self.negative_prompt] * len(places) if self.settings["true_cfg"] > 1 else None
        return self.sampler.encode(images.to(device), masks.to(device), prompts, negatives)

    def _add(self, step: int, places: Sequence[int], shown: tuple[Tensor, Tensor], pasted: tuple[Tensor, Tensor]) -> None:
        """The rows of one batch: `shown` to the judges, `pasted` measured; each the policy's edits and the base's, [B, 3, H, W]."""
        conditions = [self.conditions[place] for place in places]
        task = self.taxonomy.task(conditions[0].task)
        opinions = [self._opinions(judge, task, conditions, *shown) if judge else None for judge in (self.judge, self.second)]
        for row, (place, condition) in enumerate(zip(places, conditions, strict=True)):
            for dimension in task.dimensions:
                judged, seconded = (told[dimension][row] if told else None for told in opinions)
                assert judged is not None
                edits = pasted[0][row], pasted[1][row]
                self.rows.append(
                    Look(
                        step=step,
                        condition_id=condition.id,
                        source_id=condition.source_id,
                        origin=condition.origin,
                        task=task.name,
                        dimension=dimension,
                        judge=judged,
                        second=seconded,
                        measure_win=self._true(place, dimension, *edits),
                        blind_win=self._blind(place, dimension, *edits),
                    )
                )

    def _opinions(self, judge: Judge, task: Task, conditions: Sequence[Condition], after: Tensor, before: Tensor) -> dict[str, list[float]]:
        """Dimension -> P(the policy's edit is better) [B], mean of both orders."""
        seen = judge.encode(after), judge.encode(before)
        first, second = seen[0].join(seen[1]), seen[1].join(seen[0])
        found = {}
        for dimension in task.dimensions:
            queries = [self.taxonomy.query(task.name, dimension, condition.prompt) for condition in conditions] * 2
            forward, backward = judge.compare(first, second, queries).sigmoid().view(2, -1)
            found[dimension] = ((forward + 1 - backward) / 2).tolist()
        return found

    def _true(self, place: int, dimension: str, after: Tensor, before: Tensor) -> float | None:
        condition, key = self.conditions[place], f"{self.conditions[place].id}.target"
        if condition.kind != SCENE or key not in self.shards:
            return None
        target, mask, name = to_tensor(self.shards[key]), self._sources[place][1], self.taxonomy.dimension(dimension).accepted_by
        score = partial(accept, name, target=target, mask=mask, truth=condition.truth, prompt=condition.prompt)
        return self._won(place, name, lambda edit: score(image=edit), after, before)

    def _blind(self, place: int, dimension: str, after: Tensor, before: Tensor) -> float | None:
        name, (source, mask), prompt = self.taxonomy.dimension(dimension).measured_by, self._sources[place], self.conditions[place].prompt
        if name not in RELIABLE:
            return None
        return self._won(place, name, lambda edit: blind(name, Edit(edit, source, mask, prompt), None), after, before)

    def _won(self, place: int, name: str, score: Callable[[Tensor], float], after: Tensor, before: Tensor) -> float:
        """1, 1/2 or 0 by one measure; what the base's edit scored is kept."""
        if (place, name) not in self._scores:
            self._scores[place, name] = score(before)
        return won(score(after), self._scores[place, name], TIE_TOLERANCE)

    @property
    def best(self) -> int | None:
        """The step of the checkpoint to deliver, None before the first look."""
        return choose(self.rows, self.enough, self.over_optimised)

    def stale(self, patience: int) -> bool:
        """Whether `patience` checkpoints in a row were no better than the best; never with 0."""
        best = self.best
        return best is not None and 0 < patience <= sum(step > best for step in _by_step(self.rows))


def choose(rows: Sequence[Look], enough: float, left_out: Collection[int]) -> int | None:
    """Of the steps that are not left out (of all where every one is) the one that the second judge scores highest, the first of
    equals: mean over tasks and dimensions of min(enough, mean P(Yes)). Without a second judge the last one."""
    steps = _by_step(rows)
    left = [step for step in steps if step not in left_out] or list(steps)
    if any(row["second"] is None for row in rows):
        return max(left, default=None)

    def score(step: int) -> float:
        cells: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in steps[step]:
            assert row["second"] is not None
            cells[row["task"], row["dimension"]].append(row["second"])
        capped = [min(enough, sum(told) / len(told)) for told in cells.values()]
        return nested_mean(capped, [[task for task, _ in cells]])

    return max(left, key=score, default=None)


def summary(rows: Sequence[Look]) -> list[dict[str, Any]]:
    """Per step, in order: the share of comparisons won by each opinion, mean over tasks of means over dimensions; None where unknown."""
    return [
        {"step": step, **{by: _share(looks, by) for by in ("judge", "second", "measure_win")}} for step, looks in _by_step(rows).items()
    ]


def hindsight(trained: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a mode's entry under `training`: the look at the delivered checkpoint, at the best one by the truth, which the choice did not
    read, and the `gap` between their win rates. None where the truth is not known."""
    looks = [look for look in (trained or {}).get("looks") or () if look["measure_win"] is not None]
    if not trained or not looks:
        return None
    chosen = next(look for look in looks if look["step"] == trained["best_step"])
    best = max(looks, key=lambda look: look["measure_win"])
    return {"chosen": chosen, "best": best, "gap": best["measure_win"] - chosen["measure_win"]}


def unrewarded(rewarded: Mapping[str, Sequence[str]], taxonomy: Taxonomy) -> list[tuple[str, str]]:
    """The cells of active tasks, as (task, dimension), that are not among the dimensions rewarded by task."""
    return [(task, name) for task, name in taxonomy.cells if name not in rewarded.get(task, ())]


def _by_step(rows: Sequence[Look]) -> dict[int, list[Look]]:
    """The rows of each step, in order of steps."""
    steps: dict[int, list[Look]] = defaultdict(list)
    for row in rows:
        steps[row["step"]].append(row)
    return dict(sorted(steps.items()))


def _share(rows: Sequence[Look], by: Literal["judge", "second", "measure_win"]) -> float | None:
    known = [(row, value) for row in rows if (value := row[by]) is not None]
    if not known:
        return None
    won = [value if by == "measure_win" else outcome(value - 0.5) for _, value in known]
    return nested_mean(won, [[row["task"] for row, _ in known], [row["dimension"] for row, _ in known]])
