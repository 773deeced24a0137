"""The second judge: another checkpoint, asked in its own words, at toy size in the hub's layout."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from models.errors import BrokenWeights, ConfigError, MissingWeights
from models.images import to_pil
from models.judge import JudgeProcessor, SecondJudge, Template
from models.judge.second import SHIPPED
from tests.models.tiny_judge import save_tiny_judge

PROMPT = "remove the red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_judge(tmp_path_factory.mktemp("second"), seed=3)


def pictures(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(3, 64, 64, generator=draw).mul(255).round() / 255 for _ in range(count)]


def pointwise(**changes: object) -> Template:
    return Template(**{"kind": "pointwise", "images": ("source", "edit"), "text": "Rate {prompt}.", "answer_starts": "", **changes})  # type: ignore[arg-type]


def test_the_shipped_template_asks_what_plain_transformers_would_be_asked(folder: Path) -> None:
    """The same chat through the official image processor and the model's own forward pass."""
    source, first, second = pictures(3)
    told = SecondJudge.load(folder, Template.load()).prefers(source, first, second, PROMPT)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor, raw = JudgeProcessor.from_pretrained(folder), yaml.safe_load(SHIPPED.read_text())
    images = processor.image_processor([to_pil(image) for image in (source, first, second)], return_tensors="pt")
    chat = processor.prompt(raw["text"].format(prompt=PROMPT), 3) + raw["answer_starts"]
    assert chat.count("<|image_pad|>") == 3 and chat.endswith("Image ")
    tokens = int(images["image_grid_thw"][0].prod()) // 4
    ids = processor.tokenizer(chat.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")
    kinds = (ids.input_ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(**ids, mm_token_type_ids=kinds, **images).logits[0, -1]
    wanted = logits[[processor.tokenizer.encode(answer)[0] for answer in raw["answers"]]].softmax(-1)[0]
    assert told == pytest.approx(wanted.item(), abs=1e-4)


def test_another_edit_changes_its_mind_and_the_order_is_told(folder: Path) -> None:
    judge = SecondJudge.load(folder, Template.load())
    source, first, second = pictures(3)
    said = {judge.prefers(source, *pair, PROMPT) for pair in ((first, second), (second, first), (first, first))}
    assert len(said) == 3


def test_a_pointwise_judge_compares_scores(folder: Path) -> None:
    judge = SecondJudge.load(folder, pointwise(answers=("0", "1", "2")))
    source, first, second = pictures(3)
    forward, backward = judge.prefers(source, first, second, PROMPT), judge.prefers(source, second, first, PROMPT)
    assert forward != 0.5 and forward + backward == pytest.approx(1)
    assert judge.prefers(source, first, first, PROMPT) == 0.5
    turned = SecondJudge.load(folder, pointwise(answers=("2", "1", "0")))
    assert turned.prefers(source, first, second, PROMPT) == pytest.approx(backward)


def test_qwen2_vl_is_read_too(folder: Path, tmp_path: Path) -> None:
    old = json.loads((folder / "config.json").read_text())
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 1, "patch_size": 8, "spatial_merge_size": 2, "mlp_ratio": 2}
    places = {name: old[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=old["text_config"], vision_config=vision, **places)).save_pretrained(tmp_path)
    JudgeProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert 0 < SecondJudge.load(tmp_path, Template.load()).prefers(*pictures(3), PROMPT) < 1


def test_what_cannot_be_a_second_judge_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=str(tmp_path)):
        SecondJudge.load(tmp_path, Template.load())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BrokenWeights, match="bert"):
        SecondJudge.load(tmp_path, Template.load())
    with pytest.raises(ConfigError, match="not one token"):
        SecondJudge.load(folder, pointwise(answers=("excellent", "bad")))


@pytest.mark.parametrize(
    "change",
    [{"images": ["source", "first"]}, {"answers": ["1", "2", "3"]}, {"kind": "pointwise"}, {"text": "{nobody}"}, {"colour": "red"}],
)
def test_a_template_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SHIPPED.read_text()), **change}))
    with pytest.raises(ConfigError, match=r"template\.yaml is not a usable template"):
        Template.load(path)
