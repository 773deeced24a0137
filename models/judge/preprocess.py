"""Qwen2.5-VL's image preprocessing in torch, so that the reward's gradient reaches the picture.

    pixel_values, grid = preprocess(images, processor.image_processor)

The same steps in the same order as `transformers.Qwen2VLImageProcessorPil`: resize to multiples of patch x merge inside its pixel limits,
normalise, cut into patches grouped 2x2, repeat in time. Where no resize is needed the values agree to float rounding; where one is, to
1.5/255 before normalisation, because PIL rounds to 8 bits after each of its two passes and torch does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize


def resized(height: int, width: int, image_processor: Qwen2VLImageProcessorPil) -> tuple[int, int]:
    """The size in pixels that the official processor would bring an image to."""
    return smart_resize(
        height,
        width,
        factor=image_processor.patch_size * image_processor.merge_size,
        min_pixels=image_processor.size["shortest_edge"],
        max_pixels=image_processor.size["longest_edge"],
    )


def preprocess(images: Tensor, image_processor: Qwen2VLImageProcessorPil) -> tuple[Tensor, Tensor]:
    """Patches of a batch of equally large images.

    Args:
        images: [B, 3, H, W] in [0, 1].
        image_processor: where means, patch sizes and pixel limits are read.

    Returns:
        pixel_values [B * h * w, 3 * T * patch * patch] and image_grid_thw [B, 3] (1, h, w), as the vision tower takes them.
    """
    height, width = resized(images.shape[-2], images.shape[-1], image_processor)
    for size in ((images.shape[-2], width), (height, width)):  # PIL's two passes: along rows, then columns, clipping after each
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std))
    patch, merge, frames = image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size
    h, w = height // patch, width // patch
    grouped = ((images - mean) / std).reshape(-1, 3, h // merge, merge, patch, w // merge, merge, patch)
    patches = grouped.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, h/m, w/m, m, m, 3, patch, patch: the merged patches lie together
    patches = patches.unsqueeze(6).expand(*patches.shape[:6], frames, patch, patch)
    grid = torch.tensor([[1, h, w]], device=images.device).expand(len(images), 3)
    return patches.reshape(len(images) * h * w, -1), grid
