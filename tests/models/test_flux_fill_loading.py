"""Loading: the same weights come back, a policy replaces or adapts the transformer, and every broken file is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from models.errors import BrokenWeights, MissingWeights
from models.flux_fill.loading import load_pipeline, load_transformer
from tests.models.tiny import save_tiny_flux, tiny_pipeline, tiny_transformer

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A policy folder with a LoRA of random weights."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False)
    get_peft_model(load_transformer(saved), config).save_pretrained(tmp_path / "policy" / "adapter")
    return tmp_path / "policy"


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_pipeline_comes_back_whole(saved):
    pipe, built = load_pipeline(saved), tiny_pipeline()
    for name in WEIGHTS:
        assert same(getattr(pipe, name), getattr(built, name))
        assert not getattr(pipe, name).training
    assert pipe.tokenizer("a cup").input_ids == built.tokenizer("a cup").input_ids
    assert pipe.tokenizer_2("a cup").input_ids == built.tokenizer_2("a cup").input_ids
    assert pipe.scheduler.config.use_dynamic_shifting


def test_dtype_and_string_path(saved):
    pipe = load_pipeline(str(saved), torch.bfloat16)
    assert {getattr(pipe, name).dtype for name in WEIGHTS} == {torch.bfloat16}
    assert load_transformer(str(saved), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_policys_own_transformer_replaces_the_base(saved, tmp_path):
    policy = tiny_transformer(seed=5)
    policy.save_pretrained(tmp_path / "transformer")
    loaded = load_transformer(saved, tmp_path)
    assert same(loaded, policy) and not same(loaded, load_transformer(saved))


def test_sharded_weights_load_and_a_missing_shard_is_named(saved, tmp_path):
    policy = tiny_transformer(seed=5)
    policy.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1 and same(load_transformer(saved, tmp_path), policy)
    shards[0].unlink()
    with pytest.raises(MissingWeights, match=shards[0].name):
        load_transformer(saved, tmp_path)


def test_an_adapter_is_merged_into_a_plain_transformer(saved, adapter, tmp_path):
    merged, base = load_transformer(saved, adapter), load_transformer(saved)
    assert type(merged) is FluxTransformer2DModel and merged.state_dict().keys() == base.state_dict().keys()
    lora = load_file(adapter / "adapter" / "adapter_model.safetensors")
    down, up = (lora[f"base_model.model.proj_out.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged.proj_out.weight, base.proj_out.weight + 2.0 * up @ down)  # lora_alpha / r = 2
    assert torch.equal(merged.x_embedder.weight, base.x_embedder.weight)
    merged.save_pretrained(tmp_path / "again" / "transformer")
    assert same(load_transformer(saved, tmp_path / "again"), merged)


def test_an_absent_folder(tmp_path):
    with pytest.raises(MissingWeights, match="nowhere"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(MissingWeights, match="nowhere"):
        load_transformer(tmp_path / "nowhere")


def test_a_policy_folder_without_a_policy(saved, tmp_path):
    with pytest.raises(MissingWeights, match="neither transformer/ nor adapter/"):
        load_transformer(saved, tmp_path)


@pytest.mark.parametrize("name", [*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler", "model_index.json"])
def test_an_absent_component_is_named(folder, name):
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    with pytest.raises(MissingWeights, match=f"base/{name}"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "scheduler"])
def test_an_empty_component_folder_is_named(folder, name):
    for file in (folder / name).iterdir():
        file.unlink()
    with pytest.raises(MissingWeights, match=f"base/{name}"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("file", ["config.json", "weights"])
def test_an_absent_file_is_named(folder, name, file):
    (folder / name / (WEIGHTS[name] if file == "weights" else file)).unlink()
    with pytest.raises(MissingWeights, match=f"base/{name}/"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(folder, name, damage):
    file = folder / name / WEIGHTS[name]
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "header": b"\xff" * 64 + data[64:], "empty": b""}[damage])
    with pytest.raises(BrokenWeights, match=f"base/{name}/{WEIGHTS[name]}"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_that_lacks_weights_is_named_and_not_filled_with_random_ones(folder, name):
    file = folder / name / WEIGHTS[name]
    tensors = load_file(file)
    dropped = next(key for key in sorted(tensors) if key.endswith("weight") and "norm" not in key)
    save_file({key: value for key, value in tensors.items() if key != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(BrokenWeights, match=f"base/{name}/{WEIGHTS[name]}"):
        load_pipeline(folder)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"num_layers": 0}, {"in_channels": 64}])
def test_another_architecture_is_refused(folder, change):
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(BrokenWeights, match="transformer"):
        load_transformer(folder)


def test_values_that_are_not_finite_are_refused(folder):
    file = folder / "transformer" / WEIGHTS["transformer"]
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BrokenWeights, match=r"not finite in proj_out\.weight"):
        load_transformer(folder)


def test_broken_adapters_are_named(saved, adapter):
    file = adapter / "adapter" / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(BrokenWeights, match=r"adapter_model\.safetensors"):
        load_transformer(saved, adapter)

    file.write_bytes(data)
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BrokenWeights, match="disagree about"):
        load_transformer(saved, adapter)

    tensors = {key: torch.zeros(7, 7) for key in tensors}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BrokenWeights, match="does not fit"):
        load_transformer(saved, adapter)

    file.unlink()
    with pytest.raises(MissingWeights, match=r"adapter_model\.safetensors"):
        load_transformer(saved, adapter)
