"""What is to be seen in an edit of a scene, classified: object, colour, shape, word, and whether what was to go is gone.

    seen(image, mask, truth, prompt, condition="object")     # {"object": True, "colour": True, "shape": False}

Yes or no about one picture, where the measures only order two. Nothing here looks at the target: the facts of the scene are enough.
Formulas, error rates and what `gone` cannot tell from a seam: docs/measures.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from models.mini.acceptance import lab, nearest_colour, word_margin
from models.mini.scenes import SHAPES, silhouette

FACTS = ("object", "colour", "shape", "word", "gone")
MARGIN_PX = 3  # ours: how much of the surroundings is looked at, for 64 px
SLIP_PX = 2  # ours: how far from its place a shape is looked for, for 64 px
VISIBLE = 0.6  # ours: an outline that explains so much of the colours is seen there; between scenes with their object and without
LEAST_SHOWN = 0.5  # ours: an object of which the mask covers less is not asked about


def seen(image: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str, condition: str) -> dict[str, bool]:
    """The facts that the request asks for; empty where it asks for none.

    Args:
        image: float32 [3, H, W] in [0, 1]. mask: [1, H, W] in {0, 1}, one where the edit was made.
        truth: of the scene. condition: what the task asks of a scene, as in the taxonomy.
    """
    thing, word = truth["object"], truth.get("word")
    if condition == "word":
        return {"word": word_margin(image, word) > 0} if word and f'"{word["text"]}"' in prompt else {}
    removed, asked = condition == "clean", f"{thing['colour']} {thing['shape']}" in prompt
    size = image.shape[-1]
    window = _window(thing["box"], mask, word)
    shown = silhouette(thing["shape"], tuple(thing["box"]), size) > 0.5
    if not (removed or asked) or (shown & window).sum() < LEAST_SHOWN * shown.sum():
        return {}
    colours = lab(image)
    explained = {shape: _explained(colours, window, shape, tuple(thing["box"])) for shape in ((thing["shape"],) if removed else SHAPES)}
    there = explained[thing["shape"]] >= VISIBLE
    if removed:
        return {"gone": not there}
    inside = colours[shown & window].mean(0)
    return {
        "object": there,
        "colour": there and nearest_colour(inside[None], truth)[0] == thing["colour"],
        "shape": there and max(SHAPES, key=explained.__getitem__) == thing["shape"],
    }


def _window(box: list[int], mask: Tensor, word: dict[str, Any] | None) -> np.ndarray:
    """The masked pixels [H, W] in and around the object's box, without the sign."""
    size = mask.shape[-1]
    margin = round(MARGIN_PX * size / 64)
    x0, y0, x1, y1 = box
    near = np.zeros((size, size), dtype=bool)
    near[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = True
    if word:
        left, top, right, bottom = word["box"]
        near[top:bottom, left:right] = False
    return near & (mask[0].numpy() > 0)


@lru_cache(maxsize=len(SHAPES))  # one edit's, and those of the other contestants, which come next
def _outlines(shape: str, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """How much of each pixel the shape covers, at the box and moved by up to `SLIP_PX` [K, H, W]."""
    slip = round(SLIP_PX * size / 64)
    steps = sorted({round(step) for step in np.linspace(-slip, slip, 2 * SLIP_PX + 1)})
    x0, y0, x1, y1 = box
    return np.stack([silhouette(shape, (x0 + dx, y0 + dy, x1 + dx, y1 + dy), size) for dy in steps for dx in steps])


def _explained(colours: np.ndarray, window: np.ndarray, shape: str, box: tuple[int, int, int, int]) -> float:
    """Largest multiple correlation, 0 to 1, of the window's L*a*b* values [H, W, 3] with the outline: the root of the share of their
    variance that two flat colours, one on the shape and one off it, would explain."""
    values = colours[window] - colours[window].mean(0)  # [P, 3]
    total = (values**2).sum()
    if total == 0:
        return 0.0
    covers = _outlines(shape, box, len(colours))[:, window]  # [K, P]
    covers = covers - covers.mean(1, keepdims=True)
    power = (covers**2).sum(1)
    known = power > 0
    share = ((covers[known] @ values) ** 2).sum(1) / (power[known] * total)
    return float(np.sqrt(share.max())) if known.any() else 0.0
