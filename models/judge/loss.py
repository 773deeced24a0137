"""The losses around the judge, as pure functions of tensors.

Fitting the judge (arXiv 2508.21066, section 3.1): L = -1/2 E[ log P(Yes | winner, loser, q) + log P(No | loser, winner, q) ].
Fitting the policy (Algorithm 1): J_e = max(0, lambda - P(Yes | evaluated, reference, q_e)), then the mean over the dimensions e.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pair_loss(winner_first: Tensor, loser_first: Tensor) -> Tensor:
    """The paper's loss over both orders, from log-odds rather than probabilities so that a sure judge does not overflow.

    Args:
        winner_first: [B] log(P(Yes) / P(No)) with the winner shown first.
        loser_first: [B] the same with the loser first.

    Returns:
        the mean loss, a scalar: log 2 for a judge that knows nothing.
    """
    return -0.5 * (F.logsigmoid(winner_first) + F.logsigmoid(-loser_first)).mean()


def hinge_reward_loss(p_yes: Tensor, cap: float, weights: Tensor) -> Tensor:
    """The mean over dimensions and batch of w_e * max(0, cap - p). A probability at or above the cap gives no gradient.

    Args:
        p_yes: [D, B] P(Yes | evaluated, reference, q_e) in [0, 1].
        cap: lambda, in (0, 1].
        weights: [D] one weight per dimension (all one in the paper).
    """
    return (weights[:, None] * F.relu(cap - p_yes)).mean()


def keep_loss(images: Tensor, sources: Tensor, masks: Tensor) -> Tensor:
    """Mean squared difference from the source over the pixels outside the mask: zero for an edit that keeps what it was told to keep.

    Ours: where the judge is shown edits pasted into their source it cannot see what happens outside, and the policy drifts there.

    Args:
        images, sources: [B, 3, H, W] in [0, 1].
        masks: [B, 1, H, W] in {0, 1}, one where pixels are to be made.
    """
    kept = 1 - masks
    return ((images - sources).pow(2) * kept).sum() / (3 * kept.sum()).clamp(min=1)
