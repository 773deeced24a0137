"""Pictures as tensors and back, and pasting an edit into its source.

Images are float32 [3, H, W] in [0, 1]; masks float32 [1, H, W] in {0, 1}, one where pixels are to be made.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from models.errors import ConfigError


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def to_mask(image: Image.Image) -> Tensor:
    """A mask picture as float32 [1, H, W] in {0, 1}; grey values of 128 and more count as one."""
    return torch.from_numpy((np.asarray(image.convert("L")) >= 128).astype(np.float32))[None]


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] or [1, H, W] in [0, 1] (values outside are clipped) as an 8-bit picture."""
    values = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(values[0]) if values.shape[0] == 1 else Image.fromarray(values.transpose(1, 2, 0))


def shifted(images: Tensor, dx: int, dy: int) -> Tensor:
    """Pictures [B, 3, H, W] moved `dx` pixels to the left and `dy` up; what comes in at the border mirrors what is beside it.

    Raises ConfigError where a picture is no larger than that.
    """
    reach, (height, width) = max(abs(dx), abs(dy)), images.shape[-2:]
    if reach >= min(height, width):
        raise ConfigError(f"Pictures of {width} x {height} pixels cannot be moved by {reach}.", "Lower `jitter`.")
    return pad(images, (reach,) * 4, mode="reflect")[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def paste(source: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`image` inside the mask, `source` outside. Broadcasts over a leading batch dimension."""
    return source * (1 - mask) + image * mask
