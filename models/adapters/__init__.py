"""What a policy trains and what it is compared with: LoRA layers, and second sets of weights on the same network.

    network, parameters = trainable(transformer, lora_rank=16, lora_alpha=16)
    reference = Shadow(parameters)                 # a copy of the trained weights only: with LoRA that is a few MB
    with reference.applied():                      # the network now is the reference; afterwards it is the policy again
        image = sample(transformer, ...)
    reference.follow(decay=0.99)                   # reference <- decay * reference + (1 - decay) * policy (Algorithm 2)

A fresh LoRA adds nothing, so a shadow taken at the start is the base itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp", "proj_out"]


def trainable(
    transformer: FluxTransformer2DModel, *, lora_rank: int, lora_alpha: int
) -> tuple[FluxTransformer2DModel | PeftModel, dict[str, nn.Parameter]]:
    """The network to train, and those of its weights that train, by name.

    `lora_rank` 0 frees every weight; above, the base's weights are frozen and new LoRA layers of that rank train, on the
    projections of attention and MLP.
    """
    network: FluxTransformer2DModel | PeftModel = transformer.requires_grad_(lora_rank == 0)
    if lora_rank:
        network = get_peft_model(transformer, LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_LAYERS))
    return network, {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


class Shadow:
    """A second set of values for the same parameters: the reference of Algorithms 1 and 2, or the average of Algorithm 1."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the shadow's values; the policy's come back whatever happens."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """shadow <- decay * shadow + (1 - decay) * policy, with decay tau in [0, 1]."""
        torch._foreach_lerp_(list(self.values.values()), [parameter.data for parameter in self.parameters.values()], 1 - decay)

    def load(self, values: dict[str, Tensor]) -> None:
        """Take saved values, as resuming does."""
        for name, value in values.items():
            self.values[name].copy_(value)
