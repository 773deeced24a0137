"""The optimiser of the mini base moves every parameter, kernels included, and stops at rate zero."""

import pytest
import torch
from torch import nn

from ops.pretrain_descent import Descent


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1), nn.Flatten(), nn.Linear(48, 4)).to(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("adam_only", [(), ("4.",)])
def test_every_parameter_moves_and_the_loss_falls(adam_only):
    network = _network()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    x, y = torch.randn(32, 3, 4, 4), torch.randn(32, 4)
    descent = Descent(network, steps=120, learning_rate=1e-2, muon_rate=0.02, adam_only=adam_only)
    losses = []
    for _ in range(descent.steps):
        loss = (network(x) - y).pow(2).mean()
        descent.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_a_matrix_moves_orthogonally_and_the_last_steps_hardly_at_all():
    network = nn.Linear(6, 6)
    descent = Descent(network, steps=100, learning_rate=0.01, muon_rate=0.1, adam_only=())
    moved = []
    for _ in range(descent.steps):
        before = network.weight.detach().clone()
        descent.step(network(torch.randn(8, 6)).pow(2).mean())
        moved.append(torch.linalg.svdvals(network.weight.detach() - before))
    level = moved[50]
    assert level.min() > 0.4 * level.max()  # Newton-Schulz brings singular values near one, not to it
    assert descent.cooling and moved[-1].max() < 0.1 * level.max()
