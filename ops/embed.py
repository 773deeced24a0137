"""Pictures as vectors, for picking a diverse subset (the paper: CLIP embeddings, then K-means).

embed = vae_embedder(base)            # the base's own VAE: nothing to fetch
embed = clip_embedder(folder)         # a CLIP checkpoint
vectors = embed(images)               # [B, 3, H, W] in [0, 1] -> [B, D], on the CPU
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from models.device import default_device
from models.errors import MissingWeights
from models.flux_fill.loading import load_network
from models.images import to_pil

Embedder = Callable[[Tensor], Tensor]


def vae_embedder(base: Path) -> Embedder:
    """Mean and spread of each latent channel of a base's VAE: what colours and how much texture. D = 2 x latent channels.

    Raises MissingWeights where the base (a folder in diffusers' layout) holds no VAE, BrokenWeights where its file cannot be used.
    """
    vae = load_network(AutoencoderKL, base / "vae", torch.float32).to(default_device())

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        latents = vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mode()  # [B, C, H/8, W/8]
        return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], dim=1).cpu()  # [B, 2C]

    return embed


def clip_embedder(folder: Path) -> Embedder:
    """The pooled, normalised output of a CLIP checkpoint's vision tower.

    Raises MissingWeights where the folder is none or lacks a file, BrokenWeights where its weights cannot be used.
    """
    model = load_network(CLIPVisionModel, folder, torch.float32).to(default_device())
    try:
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    except OSError as error:
        raise MissingWeights(f"{folder} holds no image processor of a CLIP checkpoint.", "Name a CLIP checkpoint, or 'vae'.") from error

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        pixels = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
        return torch.nn.functional.normalize(model(pixel_values=pixels.to(model.device)).pooler_output, dim=-1).cpu()  # [B, D]

    return embed
