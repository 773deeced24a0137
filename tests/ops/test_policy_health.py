"""What stored weights say of a policy: how far they moved, read from the files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models.adapters import LORA_LAYERS
from models.flux_fill.loading import load_transformer
from ops.policy_health import stored_change
from tests.models.tiny import tiny_transformer


def relative_change(base: Path, policy: Path) -> float:
    """The same from the loaded networks, adapters merged."""
    before, after = (load_transformer(base, folder).state_dict() for folder in (None, policy))
    moved, start = (
        sum(float(value.double().square().sum()) for value in values)
        for values in ((after[name] - before[name] for name in before), before.values())
    )
    return (moved / start) ** 0.5


def test_all_weights_trained(tiny_base: Path, tiny_policy: Path) -> None:
    assert stored_change(tiny_base, tiny_policy) == pytest.approx(relative_change(tiny_base, tiny_policy), rel=1e-4)
    assert stored_change(tiny_base, tiny_base) == 0


@pytest.mark.parametrize("fresh", [False, True])
def test_lora(tiny_base: Path, tmp_path: Path, fresh: bool) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=LORA_LAYERS, init_lora_weights=fresh)  # a fresh one adds nothing
    get_peft_model(tiny_transformer(), lora).save_pretrained(tmp_path / "adapter")
    change = stored_change(tiny_base, tmp_path)
    assert change == pytest.approx(relative_change(tiny_base, tmp_path), rel=1e-4) and (change == 0) == fresh
