"""CLIP (arXiv 2103.00020): how well a picture goes with a text, and how like two pictures are.

clip = Clip.load(folder)                    # a checkpoint such as openai/clip-vit-large-patch14
clip.image(picture) @ clip.text("a cat")    # cosine in [-1, 1]
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from models.device import default_device
from models.errors import BrokenWeights, MissingWeights
from models.flux_fill.loading import load_network
from models.images import to_pil

TEXTS_KEPT = 4096  # ours: prompts whose vectors are kept, a few kB each
FILES = ("preprocessor_config.json", "tokenizer_config.json")


class Clip:
    """Both towers with their tokenizer and image processor. Vectors are normalised, so that a product is a cosine."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil):
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.text = lru_cache(maxsize=TEXTS_KEPT)(self._text)

    @classmethod
    def load(cls, folder: Path) -> Clip:
        """Read a local checkpoint. Raises MissingWeights where a file is absent, BrokenWeights where one cannot be used."""
        model = load_network(CLIPModel, folder, torch.float32).to(default_device())
        if absent := [name for name in FILES if not (folder / name).exists()]:
            raise MissingWeights(f"{folder} has no {', '.join(absent)}.", "Download the whole CLIP checkpoint.")
        try:
            return cls(model, CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder))
        except Exception as error:  # the Rust tokenizer raises bare Exception on a cut tokenizer.json
            raise BrokenWeights(f"The processor files in {folder} cannot be read: {error}.", "Download the folder again.") from error

    @torch.no_grad()
    def image(self, picture: Tensor) -> Tensor:
        """[3, H, W] in [0, 1] -> [D], on the CPU. The processor resizes the shorter side and cuts out the centre."""
        pixels = self.processor([to_pil(picture)], return_tensors="pt")["pixel_values"]
        vision = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        return F.normalize(self.model.visual_projection(vision)[0], dim=-1).cpu()

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """A text, cut to what the tower can read, -> [D], on the CPU."""
        ids = self.tokenizer(prompt, truncation=True, max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt")
        text = self.model.text_model(input_ids=ids["input_ids"].to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(text)[0], dim=-1).cpu()
