"""A CLIP checkpoint in the hub's layout at toy size, built in code. Random weights: nothing but files and code paths is real."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tests.models.tiny import tiny_clip

PIXELS = 32


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write it and return the folder."""
    text, tokenizer = tiny_clip()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, **{name: getattr(text.config, name) for name in ("vocab_size", "max_position_embeddings", "eos_token_id")}},
        vision_config={**small, "image_size": PIXELS, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return folder
