"""Crops of the colour photographs that ship inside scikit-image's wheel: real texture for the mini preset.

They are read from the installed package and never committed. Licences are those the package itself states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image


@dataclass(frozen=True)
class Photo:
    """One square crop of a photograph. `name` is the photograph's: crops of one photograph share it, and a split."""

    name: str
    index: int
    caption: str
    licence: str
    image: Image.Image  # RGB, size x size


# file in skimage/data: (caption, licence as stated by scikit-image)
PHOTOGRAPHS = {
    "astronaut.png": ("a woman in an orange suit", "public domain (NASA)"),
    "chelsea.png": ("a cat", "CC0 (Stefan van der Walt)"),
    "coffee.png": ("a cup of coffee", "CC0 (Rachel Michetti)"),
    "hubble_deep_field.jpg": ("galaxies in space", "public domain (NASA)"),
    "rocket.jpg": ("a rocket", "public domain (SpaceX)"),
}


def photo_crops(size: int, per_photo: int, seed: int) -> Iterator[Photo]:
    """`per_photo` square crops of each photograph, resized to `size`; equal arguments give equal crops."""
    folder = Path(skimage.data.__file__).parent
    for name, (caption, licence) in PHOTOGRAPHS.items():
        rng = np.random.default_rng([seed, *name.encode()])
        with Image.open(folder / name) as opened:
            photo = opened.convert("RGB")
        for index in range(per_photo):
            side = int(min(photo.size) * rng.uniform(0.3, 1.0))
            x, y = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
            crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)
            yield Photo(Path(name).stem, index, caption, licence, crop)
