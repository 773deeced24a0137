"""Pictures as vectors, for picking a diverse subset (the paper: CLIP embeddings, then K-means).

embed = load_embedder("vae", base)                           # the preset's own VAE: nothing to fetch
embed = load_embedder("openai/clip-vit-large-patch14", base)  # a CLIP checkpoint: hub id or folder
vectors = embed(images)                                       # [B, 3, H, W] in [0, 1] -> [B, D], on the CPU
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
from models.images import to_pil

Embedder = Callable[[Tensor], Tensor]
OWN = "vae"


def load_embedder(name: str, base: Path) -> Embedder:
    """The embedder of that name: "vae" takes the VAE of `base` (diffusers layout), anything else a CLIP checkpoint.

    Raises MissingWeights where the weights cannot be loaded.
    """
    try:
        if name == OWN:
            return _vae_embedder(AutoencoderKL.from_pretrained(base, subfolder="vae"))
        return _clip_embedder(CLIPVisionModel.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name))
    except OSError as error:
        where = f"{base}/vae" if name == OWN else name
        raise MissingWeights(
            f"The embedder's weights cannot be loaded from {where}.", f"Use '{OWN}' with a base that holds one, or a CLIP checkpoint."
        ) from error


def _vae_embedder(vae: AutoencoderKL) -> Embedder:
    """Mean and spread of each latent channel: what colours and how much texture. D = 2 x latent channels."""
    vae.eval().to(default_device())

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        latents = vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mode()  # [B, C, H/8, W/8]
        return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], dim=1).cpu()  # [B, 2C]

    return embed


def _clip_embedder(model: CLIPVisionModel, processor: CLIPImageProcessorPil) -> Embedder:
    model.eval().to(default_device())

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        pixels = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
        return torch.nn.functional.normalize(model(pixel_values=pixels.to(model.device)).pooler_output, dim=-1).cpu()  # [B, D]

    return embed
