"""A pointwise Bradley-Terry judge with the weights and the answers of the pairwise one: what pairwise judging is worth.

    judge = PointwiseJudge.load("data/mini/judge", Taxonomy.load())

Every picture is asked about alone: its score s(x, q) is log P(Yes) / P(No) of the same answer head for the same question, the other
picture being an even grey. Then P(a better) = sigmoid(s(a, q) - s(b, q)) (Bradley and Terry, 1952), and the paper's loss over both orders
is exactly -log sigmoid(s(winner) - s(loser)). Nothing is added to the network, so both judges start from the same base weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.judge import Judge, Seen

GREY = 0.5  # ours: what a picture is held against


class PointwiseJudge(Judge):
    """A `Judge` whose opinion of a pair is the difference of two scores: turning the pair round turns the sign and no more."""

    def compare(self, first: Seen, second: Seen, queries: Sequence[str]) -> Tensor:
        """s(first) - s(second), the log-odds [B] that each `first` is better than its `second`."""
        return self.score(first, queries) - self.score(second, queries)

    def score(self, seen: Seen, queries: Sequence[str]) -> Tensor:
        """s(x, q) [B] of each picture alone, one query each."""
        side = self.processor.image_processor.patch_size
        _, h, w = seen.grid
        grey = self.encode(torch.full((1, 3, h * side, w * side), GREY))
        return super().compare(seen, Seen(grey.tokens.expand_as(seen.tokens), grey.grid), queries)
