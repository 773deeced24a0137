"""Mini base, part one: the autoencoder. Called by ops/pretrain_mini.py.

Reconstruction of 32 px crops of scenes and photographs: `L = |y - x| + 2 (y - x)^2 + kl_weight * KL`, AdamW with a
one-cycle learning rate. Afterwards the scaling and shift factors are set so that latents have mean 0 and deviation 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from infra.progress import Progress
from models.mini.build import IMAGE_SIZE, build_vae
from models.mini.photos import photo_crops
from models.mini.scenes import render_scene

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


def pretrain_vae(steps: int, batch: int, learning_rate: float, seed: int, progress: Progress) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train the autoencoder; returns it with its PSNR in dB on unseen scenes and on other crops of the photographs."""
    torch.manual_seed(seed)
    pictures = base_pictures(2500, 320)
    vae = build_vae().to(memory_format=torch.channels_last)  # a third faster on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    with progress.bar("pretrain vae", steps, "step") as bar:
        for _ in range(steps):
            rows = torch.randint(len(pictures), (batch,))
            top, left = torch.randint(IMAGE_SIZE - CROP_PX + 1, (2,)).tolist()
            x = pictures[rows, :, top : top + CROP_PX, left : left + CROP_PX].float() / 127.5 - 1  # [B, 3, 32, 32]
            x = x.to(memory_format=torch.channels_last)
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
            loss = (y - x).abs().mean() + 2 * F.mse_loss(y, x) + KL_WEIGHT * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(1, loss=float(loss))
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    _normalise_latents(vae, pictures[:512])
    scenes = base_pictures(64, 0, first_scene=2 * BASE_SCENES)
    photographs = base_pictures(0, 12, seed=9)
    return vae, {"psnr_scenes": reconstruction_psnr(vae, scenes), "psnr_photos": reconstruction_psnr(vae, photographs)}


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in pictures.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
