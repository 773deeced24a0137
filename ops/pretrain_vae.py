"""Mini base, part one: the autoencoder. Called by ops/pretrain_mini.py.

Reconstruction of scenes and photographs: `L = mean over pictures of sqrt(mean (y - x)^2) + kl_weight * KL`. The root weighs
pictures between the squared error, which attends to busy ones alone, and its logarithm, which is PSNR. Crops of 32 px first, whole
pictures while the rate falls, because group norms see other statistics there.
Afterwards the scaling and shift factors are set so that latents have mean 0 and deviation 1.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from infra.progress import Progress
from models.mini.build import IMAGE_SIZE
from models.mini.photos import photo_crops
from models.mini.scenes import render_scene
from ops.pretrain_descent import Descent

# Seeds of scenes used to train the bases start here; the chain's own scenes count from zero, so they never meet.
BASE_SCENES = 10_000_000
CROP_PX = 32  # ours
KL_WEIGHT = 1e-6  # ours


def base_pictures(scenes: int, crops_per_photo: int, *, first_scene: int = BASE_SCENES, seed: int = 1) -> Tensor:
    """Scenes and photograph crops as uint8 [M, 3, 64, 64]."""
    pictures = [np.asarray(render_scene(first_scene + index, IMAGE_SIZE).image) for index in range(scenes)]
    if crops_per_photo:
        pictures += [np.asarray(photo.image) for photo in photo_crops(IMAGE_SIZE, crops_per_photo, seed)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of decode(encode(x)) over uint8 pictures [M, 3, H, W]."""
    pixels = pictures.float() / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return float((-10 * ((decoded - pixels) / 2).pow(2).mean((1, 2, 3)).log10()).mean())


def pretrain_vae(
    vae: AutoencoderKL, *, steps: int, batch: int, learning_rate: float, muon_rate: float, seed: int, progress: Progress
) -> dict[str, float]:
    """Train the autoencoder in place; returns its PSNR in dB on unseen scenes and on other crops of the photographs."""
    torch.manual_seed(seed)
    pictures = base_pictures(2500, 320)
    vae.train().requires_grad_(True).to(memory_format=torch.channels_last)  # a third faster on a CPU
    descent = Descent(vae, steps=steps, learning_rate=learning_rate, muon_rate=muon_rate, adam_only=("conv_in", "conv_out"))
    with progress.bar("pretrain vae", steps, "step") as bar:
        for _ in range(steps):
            side, count = (IMAGE_SIZE, max(1, batch // 4)) if descent.cooling else (CROP_PX, batch)  # of equal cost
            rows = torch.randint(len(pictures), (count,))
            top, left = torch.randint(IMAGE_SIZE - side + 1, (2,)).tolist()
            x = pictures[rows, :, top : top + side, left : left + side].float() / 127.5 - 1  # [B, 3, side, side]
            x = x.to(memory_format=torch.channels_last)
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
            loss = ((y - x).pow(2).mean((1, 2, 3)) + 1e-6).sqrt().mean() + KL_WEIGHT * posterior.kl().mean()
            descent.step(loss)
            bar.advance(1, loss=loss.item())
    vae.to(memory_format=torch.contiguous_format).eval()
    _normalise_latents(vae, pictures[:512])
    scenes = base_pictures(64, 0, first_scene=2 * BASE_SCENES)
    photographs = base_pictures(0, 12, seed=9)
    return {"psnr_scenes": reconstruction_psnr(vae, scenes), "psnr_photos": reconstruction_psnr(vae, photographs)}


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in pictures.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
