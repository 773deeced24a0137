"""Differentiable preprocessing against Qwen2VLImageProcessorPil, at the mini size and with Qwen2.5-VL's own settings."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import Qwen2VLImageProcessorPil

from models.images import to_tensor
from models.judge.preprocess import preprocess, resized

MINI = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=64 * 64, max_pixels=64 * 64)
FULL = Qwen2VLImageProcessorPil()  # patch 14, merge 2, 56 x 56 to 28 x 28 x 1280 pixels
SMALLEST_STD = min(FULL.image_std)


def picture(width: int, height: int, blur: float = 0.0) -> Image.Image:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(blur)) if blur else noise


@pytest.mark.parametrize(("processor", "width", "height"), [(MINI, 64, 64), (FULL, 112, 84)])
def test_without_resizing_the_values_are_the_official_ones(processor, width, height):
    image = picture(width, height)
    official = processor([image, image], return_tensors="pt")
    values, grid = preprocess(torch.stack([to_tensor(image)] * 2), processor)
    assert torch.equal(grid, official["image_grid_thw"])
    torch.testing.assert_close(values, official["pixel_values"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("processor", "width", "height"),
    [(MINI, 96, 80), (MINI, 33, 47), (FULL, 100, 75), (FULL, 40, 30), (FULL, 1300, 1000)],
    ids=["mini down", "mini up", "full to a multiple", "full up", "full down"],
)
@pytest.mark.parametrize("blur", [0.0, 2.0])
def test_resized_values_agree_to_pils_rounding(processor, width, height, blur):
    image = picture(width, height, blur)
    official = processor(image, return_tensors="pt")
    values, grid = preprocess(to_tensor(image)[None], processor)
    assert torch.equal(grid, official["image_grid_thw"])
    assert resized(height, width, processor) != (height, width)
    difference = (values - official["pixel_values"]).abs() * SMALLEST_STD * 255  # in grey levels of 255
    assert difference.max() < 1.5 and difference.mean() < 0.4


def test_the_gradient_passes_the_resize():
    image = to_tensor(picture(96, 80))[None].requires_grad_()
    preprocess(image, MINI)[0].square().sum().backward()
    assert image.grad is not None and (image.grad.abs() > 0).float().mean() > 0.9
