"""A second judge that was not fitted here: an edit judge in the hub's layout (such as UnifiedReward-Edit), asked in its own words.

    judge = SecondJudge.load(folder, Template.load())
    judge.prefers(source, first, second, "remove the cat")     # above one half: the first edit is better

It gives its opinion of a whole edit, not of a dimension. Nothing is generated: the template begins the answer, and what counts is the
softmax over the tokens that may follow. A pointwise judge's score is its answers' mean rank; two edits are compared by their scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from models.device import default_device
from models.errors import BrokenWeights, ConfigError, MissingWeights
from models.flux_fill.loading import load_network
from models.judge.preprocess import preprocess
from models.judge.processor import JudgeProcessor

SHIPPED = Path(__file__).with_name("second.yaml")
ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl")


class Template(pydantic.BaseModel):
    """How the judge is asked. `text` has a place for {prompt}."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pairwise", "pointwise"]
    images: tuple[Literal["source", "first", "second", "edit"], ...]
    text: str
    answer_starts: str
    answers: tuple[str, ...] = pydantic.Field(min_length=2)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Template:
        edits = ("first", "second") if self.kind == "pairwise" else ("edit",)
        if sorted(set(self.images) - {"source"}) != sorted(edits) or len(set(self.images)) != len(self.images):
            raise ValueError(f"a {self.kind} template shows each of {', '.join(edits)} once, and may show the source")
        if self.kind == "pairwise" and len(self.answers) != 2:
            raise ValueError("a pairwise template has two answers")
        self.text.format(prompt="")
        return self

    @classmethod
    def load(cls, path: Path | None = None) -> Template:
        """Read a template file; without a path, the one shipped here. Raises ConfigError naming the file and what is wrong."""
        path = path or SHIPPED
        try:
            return cls(**yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, TypeError, KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"{path} is not a usable template of a second judge: {error}.", f"Compare it with {SHIPPED.name}.") from error


class SecondJudge:
    """A vision-language model, its processor and the template it is asked by."""

    def __init__(
        self, model: Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration, processor: JudgeProcessor, template: Template
    ):
        self.model = model
        self.processor = processor
        self.template = template
        self.answers = torch.tensor([self._token(answer) for answer in template.answers])

    @classmethod
    def load(cls, folder: Path, template: Template, dtype: torch.dtype = torch.float32) -> SecondJudge:
        """Read a local folder of one of `ARCHITECTURES`. Raises MissingWeights, BrokenWeights, and ConfigError where an answer is not
        one token."""
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except OSError as error:
            raise MissingWeights(f"{folder / 'config.json'} is not there.", "Name the folder of an edit judge.") from error
        except ValueError as error:
            raise BrokenWeights(f"{folder / 'config.json'} is no JSON.", "Download the folder again.") from error
        if kind not in ARCHITECTURES:
            raise BrokenWeights(f"{folder} holds a {kind}.", f"A second judge is one of {', '.join(ARCHITECTURES)}.")
        model = load_network(AutoModelForImageTextToText, folder, dtype).to(default_device())
        return cls(model, JudgeProcessor.from_pretrained(folder), template)

    @torch.no_grad()
    def prefers(self, source: Tensor, first: Tensor, second: Tensor, prompt: str) -> float:
        """How sure it is that `first` is better than `second`, 0 to 1; pictures [3, H, W] in [0, 1]."""
        if self.template.kind == "pairwise":
            return float(self._asked({"source": source, "first": first, "second": second}, prompt)[0])
        return (1 + self._score(source, first, prompt) - self._score(source, second, prompt)) / 2

    def _score(self, source: Tensor, edit: Tensor, prompt: str) -> float:
        chances = self._asked({"source": source, "edit": edit}, prompt)
        return float(chances @ torch.linspace(0, 1, len(chances)))

    def _asked(self, pictures: dict[str, Tensor], prompt: str) -> Tensor:
        """Probabilities [K] of the template's answers, renormalised over them, on the CPU."""
        shown = [preprocess(pictures[name][None], self.processor.image_processor) for name in self.template.images]
        grids = torch.cat([grid for _, grid in shown])
        ids, image = self._tokenise(self.template.text.format(prompt=prompt), grids.tolist()), self.model.config.image_token_id
        device = self.model.device
        output = self.model(
            input_ids=ids[None].to(device),
            attention_mask=torch.ones_like(ids)[None].to(device),
            mm_token_type_ids=(ids == image).int()[None].to(device),
            pixel_values=torch.cat([pixels for pixels, _ in shown]).to(device, self.model.dtype),
            image_grid_thw=grids.to(device),
            logits_to_keep=1,
            use_cache=False,
        )
        return output.logits[0, -1].float().cpu()[self.answers].softmax(-1)

    def _tokenise(self, query: str, grids: Sequence[Sequence[int]]) -> Tensor:
        """Ids [L] of the chat up to the answer's beginning, one placeholder for every token of an image."""
        image, merged = self.model.config.image_token_id, self.processor.image_processor.merge_size**2
        sizes = iter([math.prod(grid) // merged for grid in grids])
        chat = self.processor.prompt(query, len(grids)) + self.template.answer_starts
        ids = self.processor.tokenizer(chat).input_ids
        return torch.tensor([token for id_ in ids for token in [id_] * (next(sizes) if id_ == image else 1)])

    def _token(self, answer: str) -> int:
        starts, tokenizer = self.template.answer_starts, self.processor.tokenizer
        before, whole = tokenizer(starts).input_ids, tokenizer(starts + answer).input_ids
        if whole[:-1] != before:
            raise ConfigError(
                f"The answer {answer!r} after {starts!r} is not one token of this judge.", "Let `answer_starts` say what comes before it."
            )
        return whole[-1]
