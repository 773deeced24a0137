"""Releases: a pipeline that loads, with the policy's transformer and the base's rest, and a card that tells what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from infra.progress import Progress
from infra.stores.base import directory_digest
from models.errors import ExportError, MissingWeights
from models.flux_fill import FluxFillCFGPipeline
from models.flux_fill.loading import load_pipeline, load_transformer
from models.flux_fill.sampler import Sampler
from models.images import to_mask, to_tensor
from models.taxonomy import Taxonomy
from ops.folders import read_metrics, save_picture, write_metrics
from ops.release import ReleaseConfig, assemble_release
from ops.train_policy import Trainer, train_policy
from ops.win_rates import Item, recompute, write_items
from tests.models.tiny import tiny_picture, tiny_transformer
from tests.ops.test_train_policy import QUICK, make_parts

LINEAGE = [{"name": "curated_dataset", "digest": "c0ffee" * 10}, {"name": "policy-ema", "digest": "decade" * 10}]
GATES = [
    {"name": "preservation", "measure": 31.25, "threshold": 30.0, "passed": True, "description": "dB"},
    {"name": "engine_verified", "measure": None, "threshold": None, "passed": True, "description": ""},
]


def evaluation_of(policy: Path, folder: Path) -> Path:
    """Records of a base and two modes on four scenes and a photograph, `ema` being `policy`, with figures made from them."""
    items = []
    for index in range(5):
        for name, score in (("base", 0.5), ("static", 0.4), ("ema", 0.9 if index else 0.1)):
            items.append(
                Item(
                    split="test",
                    condition_id=f"c{index}",
                    source_id=f"s{index}",
                    origin=f"s{index}",
                    task="remove",
                    kind="scene" if index < 4 else "photo",
                    prompt="remove",
                    seed=index,
                    policy=name,
                    policy_digest=directory_digest(policy)[0] if name == "ema" else f"of {name}",
                    judge_digest="",
                    measures={"removal_quality": score} if index < 4 else {},
                    confirming_measures={"removal_quality": score} if index < 4 else {},
                    judge={} if name == "base" else {"base": {"removal_quality": [0.8, 0.3]}},
                    preservation_psnr=33.125 if name == "ema" else 30.5,
                    outside_similarity=0.97,
                    withheld_psnr=None,
                    seen={},
                )
            )
    folder.mkdir()
    write_items(folder / "items.jsonl", items)
    figures = recompute(items, Taxonomy.load(), split="test", choose_split="test", tie_tolerance=0.005)
    write_metrics(folder, {**figures, "sampling": {"steps": 8, "true_cfg": 3.0, "guidance_scale": 2.0, "negative_prompt": 'a "blur"'}})
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """Small `onnx` and `engine` artifacts and an empty folder to fill."""
    for name in ("onnx", "engine", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "onnx" / "transformer.onnx").write_bytes(b"graph")
    shapes = [{"batch": 2, "image_tokens": 20, "text_tokens": 10, "relative_error": 4.1e-7}]
    write_metrics(
        tmp_path / "onnx", {"relative_error": 4.1e-7, "opset": 20, "dtype": "float32", "shapes": shapes, "provider": "CPUExecutionProvider"}
    )
    (tmp_path / "engine" / "transformer.engine").write_bytes(b"plan")
    built = {"bytes": 4, "architectures": [80, 89], "builder": "tensorrt_rtx_bindings", "builder_version": "1.7"}
    write_metrics(tmp_path / "engine", {**built, "verified": False, "reason": "built without a GPU; it was never executed"})
    return {name: tmp_path / name for name in ("onnx", "engine", "out")}


@pytest.fixture
def assemble(tiny_base: Path, parts: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(policy: Path, base: Path = tiny_base, **config: Any) -> dict[str, Any]:
        evaluation = evaluation_of(policy, tmp_path / "evaluation")
        chosen = ReleaseConfig(**config)
        return assemble_release(
            chosen, base, policy, parts["onnx"], parts["engine"], evaluation, parts["out"], Progress(), lineage=LINEAGE, gates=GATES
        )

    return run


def test_the_model_folder_is_a_pipeline_with_only_the_transformer_changed(
    assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_base: Path, tiny_policy: Path
) -> None:
    assemble(tiny_policy)
    released, base = FluxFillCFGPipeline.from_pretrained(parts["out"] / "model"), load_pipeline(tiny_base)
    assert json.loads((parts["out"] / "model" / "model_index.json").read_text())["_class_name"] == "FluxFillPipeline"
    policy = load_transformer(tiny_base, tiny_policy).state_dict()
    torch.testing.assert_close(dict(released.transformer.state_dict()), dict(policy), rtol=0, atol=0)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        expected = getattr(base, name).state_dict()
        torch.testing.assert_close(dict(getattr(released, name).state_dict()), dict(expected), rtol=0, atol=0)
    assert released.scheduler.config == base.scheduler.config
    picture, mask = tiny_picture()
    released.set_progress_bar_config(disable=True)
    edit = released(
        prompt="a red ball", image=picture, mask_image=mask, height=64, width=64, num_inference_steps=1, output_type="np"
    ).images
    assert edit.shape == (1, 64, 64, 3)


def test_the_card_shows_the_policys_own_picture(assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_policy: Path) -> None:
    assemble(tiny_policy)
    shown = "pictures/before_after.png"
    assert f"]({shown})" in (parts["out"] / "README.md").read_text()
    assert (parts["out"] / shown).read_bytes() == (tiny_policy / shown).read_bytes()


def test_the_exports_are_copied_byte_for_byte(assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_policy: Path) -> None:
    assemble(tiny_policy)
    assert directory_digest(parts["out"] / "onnx") == directory_digest(parts["onnx"])
    assert directory_digest(parts["out"] / "engine") == directory_digest(parts["engine"])


def test_the_card_tells_what_was_measured_and_what_was_not(
    assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_policy: Path
) -> None:
    metrics = assemble(tiny_policy, base_model="owner/base", licence="apache-2.0")
    card = ModelCard.load(parts["out"] / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("owner/base", "apache-2.0", "diffusers")
    assert metrics["mode"] == "ema" and metrics["mean_win_rate"] == 0.75  # three of four scenes won
    assert "mode `ema`" in card.text and "**75.0 %**" in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| remove | removal_quality |"))
    assert "| 4 | 75.0 % |" in row and row.endswith("| 100.0 % |")
    assert "33.12 dB" in card.text and "30.5 dB" in card.text
    assert all(entry["digest"] in card.text for entry in LINEAGE)
    assert "| preservation | 31.25 | 30 | yes |" in card.text and "| engine_verified | none | none | yes |" in card.text
    assert "4.10e-07" in card.text and "compute capabilities 80, 89" in card.text
    assert "**unverified**" in card.text and "- The engine is unverified: built without a GPU; it was never executed." in card.text
    assert "Not evaluated, for want of a condition in the test split: fill, text, extend, extend_free." in card.text
    assert "| fill | 0 | not evaluated | none |" in card.text and "4 paired edits of 4 conditions" in card.text
    assert "1 were compared by the judge alone." in card.text and "`apache-2.0`" in card.text
    assert read_metrics(parts["out"]) == metrics
    sampled = ("num_inference_steps=8,", "true_cfg=3.0,", "guidance_scale=2.0,", "negative_prompt='a \"blur\"',")
    assert all(said in card.text for said in sampled)
    assert metrics["engine"] == {"bytes": 4, "architectures": [80, 89], "verified": False}


def test_tables_are_whole(assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_policy: Path) -> None:
    """Markdown ends a table at a blank line and a row at a wrong count of columns."""
    assemble(tiny_policy)
    text = (parts["out"] / "README.md").read_text()
    runs = [list(run) for table, run in groupby(text.splitlines(), key=lambda line: line.startswith("|")) if table]
    assert [len(run) for run in runs] == [7, 3, 4, 4]  # head, rule and rows of tasks, cells, gates, lineage
    assert all(len({line.count("|") for line in run}) == 1 for run in runs)


def test_an_adapter_is_merged(assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_transformer(), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "policy" / "adapter")
    save_picture(tmp_path / "policy", "before_after", Image.new("RGB", (8, 8)))
    assemble(tmp_path / "policy")
    released = FluxFillCFGPipeline.from_pretrained(parts["out"] / "model").transformer.state_dict()
    base = load_transformer(tiny_base).state_dict()
    assert released.keys() == base.keys()
    changed = {name for name in base if not torch.equal(released[name], base[name])}
    assert changed == {name for name in base if name.endswith("to_q.weight")}


def test_the_release_of_a_lora_policy_is_the_next_base_and_reference(
    assemble: Callable[..., dict[str, Any]], parts: dict[str, Path], tmp_path: Path
) -> None:
    base, judge, curated = make_parts(tmp_path / "training")
    (policy := tmp_path / "policy").mkdir()
    lora = QUICK.model_copy(update={"lora_rank": 2})
    train_policy(lora, base, judge, curated, policy, Progress(), Taxonomy.load(), mode="ema", scratch=tmp_path / "scratch")
    assemble(policy, base=base)

    trainer = Trainer(lora, parts["out"] / "model", judge, curated, Taxonomy.load(), "static")
    trainer.iterate(0)
    with trainer.reference.applied():
        reference = sample(trainer.sampler, trainer.policy)
    pipe = load_pipeline(base)
    applied = sample(Sampler(pipe), load_transformer(base, policy))
    assert reference.numpy().tobytes() == applied.numpy().tobytes()
    on_top = PeftModel.from_pretrained(pipe.transformer, str(policy / "adapter"))
    torch.testing.assert_close(reference, sample(Sampler(pipe), on_top), rtol=0, atol=1e-4)
    assert not torch.equal(reference, sample(Sampler(load_pipeline(base)), load_transformer(base)))
    assert not torch.equal(reference, sample(trainer.sampler, trainer.policy))  # which has left it


@torch.no_grad()
def sample(sampler: Sampler, transformer: Any) -> torch.Tensor:
    """One edit [1, 3, 64, 64]."""
    picture, mask = tiny_picture()
    encoded = sampler.encode(to_tensor(picture)[None], to_mask(mask)[None], ["a red ball"])
    return sampler.sample(transformer, encoded, [7], steps=2)


def test_a_policy_that_was_not_evaluated_is_refused(tiny_base: Path, tiny_policy: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    evaluation = evaluation_of(tiny_policy, tmp_path / "evaluation")
    tiny_transformer(seed=2).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(ExportError, match="did not measure the policy"):
        assemble_release(
            ReleaseConfig(),
            tiny_base,
            tmp_path / "other",
            parts["onnx"],
            parts["engine"],
            evaluation,
            parts["out"],
            Progress(),
            lineage=[],
            gates=[],
        )
    assert not list(parts["out"].iterdir())


def test_an_absent_base_is_named(assemble: Callable[..., dict[str, Any]], tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match="nowhere"):
        assemble(tiny_policy, base=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("readme", "licence", "said"),
    [
        ("---\nlicense: other\nlicense_name: some-licence\n---\n# Base\n", "some-licence", "stay under its licence, `some-licence`"),
        ("# No front matter\n", "unknown", "The base names none"),
        ("---\n[not: yaml\n---\n", "unknown", "The base names none"),
    ],
)
def test_the_licence_is_the_base_cards(
    assemble: Callable[..., dict[str, Any]],
    parts: dict[str, Path],
    tiny_base: Path,
    tiny_policy: Path,
    readme: str,
    licence: str,
    said: str,
) -> None:
    (tiny_base / "README.md").write_text(readme)
    try:
        assemble(tiny_policy)
    finally:
        (tiny_base / "README.md").unlink()
    card = ModelCard.load(parts["out"] / "README.md")
    assert card.data.license == licence and said in card.text
