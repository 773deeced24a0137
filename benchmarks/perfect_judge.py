"""A judge that knows the perfect edit, in the fitted one's place: what the training would win if its judge never erred.

    make_trainer = partial(PerfectlyJudged, spread(curated, candidates, taxonomy, progress))     # for ops.train_policy.train_policy
    python -m benchmarks.ablations --arms 'policy/perfect_judge*'

It answers by the measure that the annotator labels with: log(P(Yes) / P(No)) is the difference of the two edits' measures in standard
deviations of that measure among one condition's candidates. So it is perfect by the annotator's family of measures; the acceptance
family, by which wins are counted, is another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.progress import Progress
from models.images import to_tensor
from models.mini.measures import agreement
from models.records import Condition, read_rows
from models.taxonomy import Task, Taxonomy
from ops.label import Spread, by_condition, score_candidates, spread_of
from ops.train_policy import Trainer

GRAIN = 1e-3  # ours: deviation of the noise on what is measured: without it the gradient of a correlation with an even patch is not finite


def spread(curated: Path, candidates: Path, taxonomy: Taxonomy, progress: Progress) -> Spread:
    """The spread by which the annotator calls ties: of training conditions."""
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    train = {name: ids for name, ids in by_condition(candidates).items() if conditions[name].split == "train"}
    return spread_of(conditions, score_candidates(conditions, train, curated, candidates, taxonomy, progress))


class PerfectlyJudged(Trainer):
    """Trains on the conditions whose perfect edit is known. Views and jitter are nothing to it."""

    def __init__(self, deviations: Spread, *arguments: Any):
        super().__init__(*arguments)
        self.deviations = deviations
        self.conditions = [row for row in self.conditions if f"{row.id}.target" in self.shards]
        self.tasks = [task for task in self.tasks if any(row.task == task.name for row in self.conditions)]

    def log_odds(
        self, task: Task, batch: list[Condition], masks: Tensor, evaluated: Tensor, reference: Tensor, shifts: list[list[int]]
    ) -> Tensor:
        grain, rows = GRAIN * torch.randn(evaluated.shape[1:], generator=torch.Generator().manual_seed(len(self.rows))), []
        for condition, mask, *pair in zip(batch, masks.cpu(), evaluated.cpu(), reference.cpu(), strict=True):
            target = to_tensor(self.shards[f"{condition.id}.target"])
            for name in self.rewarded[task.name]:
                known = self.taxonomy.dimension(name).labelled_by
                ours, other = (agreement(known, edit + grain, target, mask, condition.truth, condition.prompt) for edit in pair)
                rows.append((ours - other).float() / self.deviations[task.name, name])
        return torch.stack(rows).view(len(batch), -1).T.to(evaluated.device)
