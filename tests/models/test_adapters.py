"""LoRA layers and shadows: nothing changes until training does, and the policy always comes back."""

import pytest
import torch

from models.adapters import Shadow, trainable
from tests.models.tiny import tiny_transformer


def test_a_fresh_lora_changes_nothing_and_is_all_that_trains():
    plain, inputs = tiny_transformer(), _inputs()
    expected = plain(**inputs)[0].detach()
    network, parameters = trainable(tiny_transformer(), lora_rank=2, lora_alpha=4)
    assert torch.equal(network(**inputs)[0], expected)
    assert parameters and all("lora" in name for name in parameters)


def test_rank_zero_trains_every_weight():
    network, parameters = trainable(tiny_transformer(), lora_rank=0, lora_alpha=1)
    assert len(parameters) == len(list(network.parameters()))


def test_the_policy_comes_back_from_a_shadow_even_after_an_error():
    network, parameters = trainable(tiny_transformer(), lora_rank=0, lora_alpha=1)
    shadow, inputs = Shadow(parameters), _inputs()
    before = network(**inputs)[0].detach()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    moved = network(**inputs)[0].detach()
    with pytest.raises(RuntimeError), shadow.applied():
        assert torch.equal(network(**inputs)[0], before)
        raise RuntimeError("in the middle")
    assert torch.equal(network(**inputs)[0], moved)


def test_following_is_the_moving_average_of_algorithm_2():
    parameter = torch.nn.Parameter(torch.tensor([0.0, 8.0]))
    shadow = Shadow({"w": parameter})
    parameter.data = torch.tensor([4.0, 0.0])
    shadow.follow(decay=0.75)
    assert torch.allclose(shadow.values["w"], torch.tensor([1.0, 6.0]))  # 0.75 * old + 0.25 * policy


def _inputs() -> dict:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 384),
        "encoder_hidden_states": torch.randn(2, 3, 24),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
