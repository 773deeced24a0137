"""Procedural scenes: pictures whose caption, object, lettering and clean background are known exactly.

    scene = render_scene(seed=7)
    scene.image, scene.clean, scene.object_mask, scene.words_mask, scene.caption, scene.words, scene.truth

A scene is a textured background in two colours, one coloured shape and, six times out of ten, a sign with a short word
in a real font (DejaVu Sans Bold, which ships inside matplotlib). The same seed gives the same picture. All values are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (244, 208, 50),
    "purple": (138, 58, 185),
    "orange": (240, 130, 30),
    "white": (240, 240, 240),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
WORDS = ("CAT", "DOG", "SUN", "TEA", "ZOO", "BUS", "EGG", "HAT", "OWL", "FIX", "MAP", "KEY")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots", "clouds")
TONES = {
    "grey": ((120, 124, 130), (176, 180, 186)),
    "sand": ((196, 170, 128), (228, 206, 168)),
    "teal": ((38, 122, 126), (92, 170, 168)),
    "pink": ((206, 128, 150), (238, 178, 192)),
    "brown": ((104, 72, 50), (152, 112, 82)),
    "sky": ((104, 160, 214), (172, 208, 240)),
    "olive": ((108, 116, 60), (156, 162, 98)),
    "navy": ((30, 40, 84), (66, 80, 132)),
}
SUPERSAMPLE = 2  # shapes and letters are drawn at twice the size for smooth edges
WORD_SHARE = 0.6


@dataclass(frozen=True)
class Scene:
    """One rendered scene. Pictures are RGB of `size` x `size`, masks L with 255 on the object or the sign."""

    seed: int
    image: Image.Image
    clean: Image.Image  # the same without the object
    object_mask: Image.Image
    words_mask: Image.Image | None
    caption: str
    words: str
    truth: dict[str, Any]


@lru_cache(maxsize=8)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", pixels)


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, str, str]:
    """Texture as float32 [size, size, 3] in 0..255, with the names of texture and tone."""
    texture, tone = TEXTURES[rng.integers(len(TEXTURES))], list(TONES)[rng.integers(len(TONES))]
    low, high = (np.array(c, dtype=np.float32) for c in TONES[tone])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    period = rng.uniform(0.14, 0.26)
    if texture == "plain":
        mix = np.full_like(x, rng.uniform(0.2, 0.8))
    elif texture == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif texture == "stripes":
        mix = 0.5 + 0.5 * np.clip(3 * np.sin(2 * math.pi * along / period), -1, 1)
    elif texture == "checks":
        mix = 0.5 + 0.5 * np.clip(6 * np.sin(math.pi * x / period) * np.sin(math.pi * y / period), -1, 1)
    elif texture == "dots":
        mix = np.clip(4 * (np.sin(2 * math.pi * x / period) * np.sin(2 * math.pi * y / period) - 0.4), 0, 1)
    else:
        coarse = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    grain = rng.normal(0, 2.0, (size, size, 1)).astype(np.float32)
    return low + (high - low) * mix[..., None] + grain, texture, tone


def _draw_shape(shape: str, box: tuple[float, float, float, float], canvas: Image.Image, fill: tuple[int, ...] | int) -> None:
    draw = ImageDraw.Draw(canvas)
    x0, y0, x1, y1 = box
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, int((x1 - x0) * 0.26)))
    else:
        cx, cy, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
        corners = [(radius if k % 2 == 0 else radius * 0.45, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
        draw.polygon([(cx + r * math.cos(a), cy + r * math.sin(a)) for r, a in corners], fill=fill)


def _cover(shape: str, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """L of `size` x `size`: how much of each pixel the shape in that box covers."""
    cover = Image.new("L", (size * SUPERSAMPLE, size * SUPERSAMPLE), 0)
    _draw_shape(shape, tuple(v * SUPERSAMPLE for v in box), cover, 255)  # type: ignore[arg-type]
    return cover.resize((size, size), Image.Resampling.BOX)


def silhouette(shape: str, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """A scene's shape in the box (x0, y0, x1, y1), in pixels: the share of each pixel [size, size] that it covers."""
    return np.asarray(_cover(shape, box, size), dtype=np.float32) / 255


def _place(rng: np.random.Generator, size: int, with_sign: bool) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int] | None]:
    """Boxes (x0, y0, x1, y1) in pixels of the object and, where there is one, of the sign, which never overlap."""
    unit = size / 64
    side = int(rng.integers(20, 29) * unit)
    sign_w, sign_h = int(38 * unit), int(17 * unit)
    sign_below = bool(rng.integers(2))
    margin = int(3 * unit)
    room_top = margin + (0 if sign_below or not with_sign else sign_h + margin)
    room_bottom = size - margin - (sign_h + margin if sign_below and with_sign else 0)
    x0 = int(rng.integers(margin, size - margin - side + 1))
    y0 = int(rng.integers(room_top, max(room_top + 1, room_bottom - side + 1)))
    sign = None
    if with_sign:
        sx = int(rng.integers(margin, size - margin - sign_w + 1))
        sy = size - margin - sign_h if sign_below else margin
        sign = (sx, sy, sx + sign_w, sy + sign_h)
    return (x0, y0, x0 + side, y0 + side), sign


def draw_sign(image: Image.Image, box: tuple[int, int, int, int], word: str, dark: bool, scale: int) -> None:
    """Paper and ink of a sign on `image`, which is `scale` times as large as the pixels that `box` is given in."""
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = (v * scale for v in box)
    paper, ink = ((32, 34, 40), (244, 244, 240)) if dark else ((244, 244, 240), (32, 34, 40))
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=paper)
    draw.text(((x0 + x1) / 2, (y0 + y1) / 2), word, font=_font(int((y1 - y0) * 0.84)), fill=ink, anchor="mm")


def render_scene(seed: int, size: int = 64, instead: Mapping[str, str] = MappingProxyType({})) -> Scene:
    """Render the scene of a seed at `size` x `size` pixels; `instead` names another colour, shape or word than the seed's.

    Nothing else changes, but that a scene without a word has none to be replaced (it would get a sign, and its object another place).
    """
    rng = np.random.default_rng([20250821, seed])
    background, texture, tone = _background(rng, size)
    shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
    word = WORDS[rng.integers(len(WORDS))] if rng.random() < WORD_SHARE else ""
    shape, colour, word = instead.get("shape", shape), instead.get("colour", colour), instead.get("word", word)
    dark = bool(rng.integers(2))
    box, sign = _place(rng, size, bool(word))

    clean = Image.fromarray(background.clip(0, 255).astype(np.uint8))
    big = size * SUPERSAMPLE
    if sign:
        layer = clean.resize((big, big), Image.Resampling.BICUBIC)
        draw_sign(layer, sign, word, dark, SUPERSAMPLE)
        x0, y0, x1, y1 = (v * SUPERSAMPLE for v in sign)
        drawn = layer.crop((x0, y0, x1, y1)).resize((sign[2] - sign[0], sign[3] - sign[1]), Image.Resampling.BOX)
        clean.paste(drawn, sign[:2])
    cover = _cover(shape, box, size)
    image = clean.copy()
    image.paste(COLOURS[colour], (0, 0, size, size), cover)

    truth: dict[str, Any] = {
        "object": {"shape": shape, "colour": colour, "box": list(box)},
        "background": {"texture": texture, "tone": tone},
    }
    words_mask = None
    if sign:
        truth["word"] = {"text": word, "box": list(sign), "dark": dark}
        words_mask = Image.new("L", (size, size), 0)
        words_mask.paste(255, sign)
    return Scene(
        seed=seed,
        image=image,
        clean=clean,
        object_mask=cover.point(lambda v: 255 if v > 8 else 0),
        words_mask=words_mask,
        caption=f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} on {tone} {texture}",
        words=word,
        truth=truth,
    )
