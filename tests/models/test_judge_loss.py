"""The losses against values worked out by hand, and their gradients."""

import math

import pytest
import torch

from models.judge import hinge_reward_loss, keep_loss, pair_loss


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_pair_loss_by_hand():
    winner_first = torch.tensor([logit(0.8), logit(0.4)])  # P(Yes) with the winner first
    loser_first = torch.tensor([logit(0.3), logit(0.9)])  # P(No) = 0.7 and 0.1
    expected = -0.25 * (math.log(0.8) + math.log(0.7) + math.log(0.4) + math.log(0.1))
    assert pair_loss(winner_first, loser_first).item() == pytest.approx(expected, abs=1e-6)
    assert pair_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2), abs=1e-6)


def test_pair_loss_of_a_sure_judge_is_finite():
    assert pair_loss(torch.tensor([-300.0]), torch.tensor([300.0])).item() == pytest.approx(300)


def test_pair_loss_gradient():
    odds = (torch.randn(5, dtype=torch.double, requires_grad=True), torch.randn(5, dtype=torch.double, requires_grad=True))
    assert torch.autograd.gradcheck(pair_loss, odds)


def test_hinge_by_hand():
    p = torch.tensor([[0.2, 0.9], [0.5, 0.7]])  # two dimensions, two samples
    # cap 0.8: hinges 0.6, 0 and 0.3, 0.1; weights 1 and 2
    assert hinge_reward_loss(p, 0.8, torch.tensor([1.0, 2.0])).item() == pytest.approx((0.6 + 2 * 0.3 + 2 * 0.1) / 4)


def test_hinge_gradient_stops_at_the_cap():
    p = torch.tensor([[0.2, 0.9], [0.5, 0.8]], requires_grad=True)
    hinge_reward_loss(p, 0.8, torch.tensor([1.0, 2.0])).backward()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.tensor([[-0.25, 0.0], [-0.5, 0.0]]))
    below = torch.rand(2, 3, dtype=torch.double).mul(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: hinge_reward_loss(q, 0.8, torch.tensor([1.0, 0.5], dtype=torch.double)), (below,))


def test_keeping_counts_only_what_lies_outside_the_mask():
    source, image = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    image[..., 0, 0], image[..., 1, 1] = 1.0, 0.5
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert keep_loss(image, source, mask).item() == pytest.approx(0.25 / 3)  # one of three kept pixels is off by a half
    assert keep_loss(image, source, torch.ones_like(mask)).item() == 0.0
