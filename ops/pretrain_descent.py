"""The optimiser of the mini base: Muon on matrices, AdamW on the rest, a rate that stays level and then falls to zero.

    descent = Descent(model, steps=2000, learning_rate=2e-3, muon_rate=0.02, adam_only=("conv_in", "conv_out"))
    for step in range(descent.steps):
        descent.step(loss)                         # backward, clip, update
        descent.cooling                            # whether the rate has begun to fall

Muon (Jordan et al., 2024) makes every update of a matrix orthogonal. The autoencoder is then where AdamW alone brings it
after some three times as many steps, for the same time per step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Every value below is ours.
WARMUP_STEPS = 40
COOLDOWN = 0.3  # share of the steps over which the rate falls linearly to zero
CLIP = 1.0


class Descent:
    """Updates the parameters of `module`; `taken` counts the updates made.

    Args:
        learning_rate: AdamW's, of vectors, embeddings and every parameter whose name holds one of `adam_only`.
        muon_rate: Muon's, of all other matrices and convolution kernels.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        steps: int,
        learning_rate: float,
        muon_rate: float,
        adam_only: tuple[str, ...],
        weight_decay: float = 0.0,
    ):
        self.steps, self.taken = steps, 0
        self._parameters = list(module.parameters())
        rest: list[nn.Parameter] = []
        # A kernel [out, in, h, w] enters Muon as the matrix [out, h * w * in], by a second parameter on the same memory.
        self._matrices: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or any(part in name for part in adam_only):
                rest.append(parameter)
            else:
                self._matrices.append((parameter, nn.Parameter(_matrix(parameter.detach()))))
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99)), learning_rate),
            (torch.optim.Muon([matrix for _, matrix in self._matrices], lr=muon_rate, weight_decay=weight_decay), muon_rate),
        ]

    @property
    def cooling(self) -> bool:
        return self.taken >= (1 - COOLDOWN) * self.steps

    def step(self, loss: Tensor) -> None:
        """One update from a scalar loss."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        for parameter, matrix in self._matrices:
            matrix.grad = None if parameter.grad is None else _matrix(parameter.grad)
        share = min(1.0, (self.taken + 1) / WARMUP_STEPS, (self.steps - self.taken) / (COOLDOWN * self.steps))
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
        self.taken += 1


def _matrix(weight: Tensor) -> Tensor:
    """`weight` as a matrix without a copy; kernels must lie in channels_last order."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)
