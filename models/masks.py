"""Masks of every kind the taxonomy names, and the check that a given mask can be used.

    make_mask("border", (64, 64), region=None, rng=numpy.random.default_rng(0))

Masks are pictures of mode L, 255 where pixels are to be made. The paper does not say how its masks were drawn, so every
shape constant here is ours; lengths are given for 64 px and grow with the shorter side.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scipy.ndimage import maximum_filter

from models.errors import BadMask
from models.taxonomy import MaskKind

PAD_PX = (2, 8)  # ours: a box is this much wider than what it covers, per side
DILATE_PX = (2, 4)  # ours: an object's mask grows by this much, so that its soft edge is inside
KEEP_SHARE = (0.50, 0.75)  # ours: share of width and height that a border mask keeps
BOX_SHARE = (0.25, 0.50)  # ours: width and height of a box drawn where nothing is known
STROKES = (2, 4)  # ours: corners of one brush line drawn where nothing is known
SWEEP_SHARE = (0.25, 0.45)  # ours: thickness of a brush that covers a thing, as a share of the thing's shorter side
Box = tuple[int, int, int, int]  # x0, y0, x1, y1; x1 and y1 exclusive


def check_mask(mask: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    """The mask as black and white (L, 0 or 255). Raises BadMask when it is of another size than its image, empty, or full."""
    if mask.size != size:
        raise BadMask(
            f"The mask of {name} is {mask.width}x{mask.height}, its image {size[0]}x{size[1]}.", "Save the mask at the size of its image."
        )
    hard = binary(mask)
    low, high = hard.getextrema()
    if high == 0:
        raise BadMask(f"The mask of {name} is empty.", "Paint white where pixels are to be made.")
    if low == 255:
        raise BadMask(f"The mask of {name} is full.", "Leave black what is to be kept.")
    return hard


def binary(mask: Image.Image) -> Image.Image:
    """Any picture as L with 0 and 255 only; 128 and more counts as white."""
    return Image.fromarray((np.asarray(mask.convert("L")) >= 128).astype(np.uint8) * 255)


def make_mask(kind: MaskKind, size: tuple[int, int], *, region: Image.Image | None, rng: np.random.Generator) -> Image.Image | None:
    """A mask of that kind for an image of `size` (width, height), drawn with `rng`.

    `region` is what box, brush, object and background go around (L, 255 on it); the first three cover all of it. Without
    it, box and brush are drawn anywhere, and object and background cannot be made: None. None also when the mask would be
    empty or full.
    """
    if region is not None and region.getbbox() is None:
        region = None
    if kind == "border":
        mask = _border(size, rng)
    elif kind == "box":
        mask = _rectangle(size, _padded(region, size, rng) if region else _anywhere(size, rng))
    elif kind == "brush":
        mask = _sweep(binary(region), rng) if region else _stroke(size, _anywhere(size, rng), rng)
    elif region is None:
        return None
    elif kind == "object":
        mask = dilate(region, _pixels(DILATE_PX, size, rng))
    else:
        mask = Image.fromarray(255 - np.asarray(binary(region)))
    return mask if mask.getextrema() == (0, 255) else None


def dilate(mask: Image.Image, by: int) -> Image.Image:
    """The mask grown by `by` pixels in every direction (a square, which is separable and therefore quick)."""
    return Image.fromarray(maximum_filter(np.asarray(binary(mask)), size=2 * by + 1))


def _pixels(span: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> int:
    scale = min(size) / 64
    return round(int(rng.integers(span[0], span[1] + 1)) * scale)


def _padded(region: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Box:
    x0, y0, x1, y1 = region.getbbox() or (0, 0, *size)
    left, top, right, bottom = (_pixels(PAD_PX, size, rng) for _ in range(4))
    return max(0, x0 - left), max(0, y0 - top), min(size[0], x1 + right), min(size[1], y1 + bottom)


def _anywhere(size: tuple[int, int], rng: np.random.Generator) -> Box:
    width, height = (max(1, round(side * rng.uniform(*BOX_SHARE))) for side in size)
    x0, y0 = int(rng.integers(0, size[0] - width + 1)), int(rng.integers(0, size[1] - height + 1))
    return x0, y0, x0 + width, y0 + height


def _rectangle(size: tuple[int, int], box: Box) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def _border(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(side * rng.uniform(*KEEP_SHARE))) for side in size)
    x0, y0 = int(rng.integers(0, size[0] - width + 1)), int(rng.integers(0, size[1] - height + 1))
    mask = Image.new("L", size, 255)
    mask.paste(0, (x0, y0, x0 + width, y0 + height))
    return mask


def _stroke(size: tuple[int, int], box: Box, rng: np.random.Generator) -> Image.Image:
    """One thick zigzag from side to side of the box."""
    x0, y0, x1, y1 = box
    count = int(rng.integers(STROKES[0], STROKES[1] + 1))
    thick = max(2, round(min(x1 - x0, y1 - y0) * rng.uniform(0.4, 0.7)))
    inset = thick // 2
    xs = np.linspace(x0 + inset, x1 - 1 - inset, count)
    ys = rng.uniform(y0 + inset, max(y0 + inset, y1 - 1 - inset) + 1e-6, count)
    return _painted(size, list(zip(xs.tolist(), ys.tolist(), strict=True)), thick)


def _sweep(region: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One line to and fro over the region, across or up and down, as a hand paints over a thing it wants covered."""
    upright = bool(rng.integers(2))
    inside = np.asarray(region.transpose(Image.Transpose.TRANSPOSE) if upright else region) > 0  # [H, W]
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    thick = max(3, round(min(np.ptp(rows), np.ptp(columns)) * rng.uniform(*SWEEP_SHARE)))
    points: list[tuple[float, float]] = []
    for y in np.arange(rows[0] + 0.3 * thick, rows[-1] + 0.3 * thick, 0.6 * thick):  # passes overlap by two fifths
        band = inside[max(0, int(y - thick / 2)) : int(y + thick / 2) + 1].any(0)
        if not band.any():
            continue  # between two parts of the region
        ends = np.flatnonzero(band)[[0, -1]] + rng.uniform(-0.2, 0.2, 2) * thick
        heights = y + rng.uniform(-0.1, 0.1, 2) * thick
        ends, heights = (ends, heights) if len(points) % 4 == 0 else (ends[::-1], heights[::-1])
        points += zip(ends.tolist(), heights.tolist(), strict=True)
    painted = _painted(region.size, [(y, x) for x, y in points] if upright else points, thick)
    return ImageChops.lighter(painted, region)  # a hand that slips goes over it again: no rounding leaves a gap


def _painted(size: tuple[int, int], points: list[tuple[float, float]], thick: int) -> Image.Image:
    """A line through the points, round at its corners and ends."""
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    draw.line(points, fill=255, width=thick, joint="curve")
    for x, y in points:
        draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)
    return mask
