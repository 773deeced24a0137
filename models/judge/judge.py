"""The reward model r(first, second, q): Qwen2.5-VL answering whether the FIRST image is better (arXiv 2508.21066, section 3.1).

    judge = Judge.load("reward_model/model", Taxonomy.load())
    p = judge.p_yes(first, second, [taxonomy.query("fill", "structure")] * len(first))     # [B], differentiable

P(Yes) is the softmax over the two answer tokens at the last position, renormalised over the pair (ours), which is sigmoid(logit(Yes) -
logit(No)): `logit` gives that log-odds. The vision tower sees each image once whatever is asked about it: `encode` once, then `compare`
in both orders or on several dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from models.errors import BadImage, BrokenWeights, ConfigError, MissingWeights
from models.judge.preprocess import preprocess
from models.judge.processor import JudgeProcessor
from models.taxonomy import Taxonomy

PROMPTS_KEPT = 4096  # ours: tokenised prompts kept, a few kB each


@dataclass(frozen=True)
class Seen:
    """Images as the language model reads them: `tokens` [B, T, D] and the patch grid (1, h, w) that all of them share."""

    tokens: Tensor
    grid: tuple[int, int, int]

    def __getitem__(self, index: slice | list[int]) -> Seen:
        return Seen(self.tokens[index], self.grid)

    def join(self, other: Seen) -> Seen:
        """This batch followed by another of the same grid. Raises BadImage when the grids differ."""
        if self.grid != other.grid:
            raise BadImage(f"Images of patch grids {self.grid} and {other.grid} cannot be one batch.", "Batch images of one size.")
        return Seen(torch.cat([self.tokens, other.tokens]), self.grid)


class Judge:
    """A Qwen2.5-VL with its processor and the taxonomy whose answers it gives. `.model` may carry LoRA layers."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: JudgeProcessor, taxonomy: Taxonomy):
        self.model = model
        self.processor = processor
        self.taxonomy = taxonomy
        self.answers = torch.tensor([self._single_token(answer) for answer in taxonomy.query_template.answers])  # Yes, No
        self._prompt = lru_cache(maxsize=PROMPTS_KEPT)(self._tokenise)

    @classmethod
    def load(cls, path: str | Path, taxonomy: Taxonomy, dtype: torch.dtype = torch.float32) -> Judge:
        """Read a local folder in the layout of Qwen2.5-VL-7B-Instruct, or a reward model, which holds one in `model/`.

        Raises MissingWeights and BrokenWeights.
        """
        folder = Path(path) / "model" if (Path(path) / "model").is_dir() else Path(path)
        remedy = "Give the folder of a Qwen2.5-VL download (hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir ...) or of a reward model."
        if not folder.is_dir():
            raise MissingWeights(f"There is no judge folder {folder}.", remedy)
        if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
            raise MissingWeights(f"{folder} has no config.json with *.safetensors beside it.", remedy)
        processor = JudgeProcessor.from_pretrained(folder)
        try:
            model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # a cut safetensors file raises the Rust library's own class, another architecture several more
            raise BrokenWeights(f"The weights in {folder} cannot be read: {error}.", "Fetch or train them again.") from error
        if wrong := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
            raise BrokenWeights(f"{folder} lacks {len(wrong)} weights of its architecture, first {wrong[0]}.", "Fetch or train them again.")
        return cls(model.eval(), processor, taxonomy)

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer, chat template and image processor in the layout that `load` reads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def p_yes(self, first: Tensor, second: Tensor, queries: Sequence[str]) -> Tensor:
        """P(Yes), that `first` is better than `second`, in [0, 1].

        Args:
            first, second: [B, 3, H, W] in [0, 1]; gradients flow into both.
            queries: B questions from `Taxonomy.query`, mixed as you like.
        """
        return self.logit(first, second, queries).sigmoid()

    def logit(self, first: Tensor, second: Tensor, queries: Sequence[str]) -> Tensor:
        """log(P(Yes) / P(No)) [B] of `p_yes`: what losses and calibration need, without the sigmoid's saturation."""
        seen = self.encode(torch.cat([first, second]))
        return self.compare(seen[: len(first)], seen[len(first) :], queries)

    def encode(self, images: Tensor) -> Seen:
        """Run the vision tower on [B, 3, H, W] in [0, 1]."""
        pixels, grid = preprocess(images.to(self.model.device, torch.float32), self.processor.image_processor)
        tokens = self.model.get_image_features(pixels, grid, return_dict=True).pooler_output  # B times [T, D]
        _, h, w = grid[0].tolist()
        return Seen(torch.stack(list(tokens)), (1, h, w))

    def compare(self, first: Seen, second: Seen, queries: Sequence[str]) -> Tensor:
        """The log-odds [B] that each `first` is better than its `second`, one query each."""
        prompts = [self._prompt(query, first.grid, second.grid) for query in queries]
        longest = max(len(ids) for ids, _ in prompts)
        device = first.tokens.device
        ids = torch.full((len(prompts), longest), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        for row, (prompt, places) in enumerate(prompts):  # padded on the left: the answer is at the last position of every row
            ids[row, -len(prompt) :] = prompt
            mask[row, -len(prompt) :] = 1
            positions[:, row, -len(prompt) :] = places
        images = torch.cat([first.tokens, second.tokens], dim=1).flatten(0, 1)  # row by row, first then second
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=(images,))},
            logits_to_keep=1,
            use_cache=False,
        )
        yes, no = output.logits[:, -1, self.answers.to(device)].float().unbind(-1)
        return yes - no

    def _single_token(self, answer: str) -> int:
        ids = self.processor.tokenizer.encode(answer)
        if len(ids) != 1:
            raise ConfigError(f"The answer {answer!r} is {len(ids)} tokens for this judge.", "Choose answers that are one token each.")
        return ids[0]

    def _tokenise(self, query: str, first: tuple[int, int, int], second: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Token ids [L] of the whole chat, image placeholders spelled out, and their rotary positions [3, L]."""
        image, merge = self.model.config.image_token_id, self.processor.image_processor.merge_size**2
        tokens: list[int] = []
        grids = iter((first, second))
        for token in self.processor.tokenizer(self.processor.prompt(query)).input_ids:
            tokens += [image] * (math.prod(next(grids)) // merge) if token == image else [token]
        ids = torch.tensor(tokens)
        positions, _ = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=(ids[None] == image).int(), image_grid_thw=torch.tensor([first, second])
        )
        return ids, positions[:, 0]
