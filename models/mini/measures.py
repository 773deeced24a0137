"""Ground-truth measures of an edit whose perfect answer is known. Higher is better; perfect is one for letters, else zero.

    measure("seam_agreement", image, target, mask, truth, prompt)
    agreement("seam_agreement", image, target, mask, truth, prompt)  # the same as a tensor

The taxonomy names one per dimension as `labelled_by`. The scripted annotator labels with them, and evaluation asks that they confirm what
it counts by the acceptance measures (models/mini/acceptance.py).
Images are float32 [3, H, W] in [0, 1], masks [1, H, W] in {0, 1}; only pixels inside the mask count. Formulas: docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ConfigError
from models.mini.scenes import COLOURS, TONES, silhouette

RING_PX = 3  # ours: width of the ring inside the mask's edge that consistency looks at, at 64 px
POOL_PX = 4  # ours: cell of the pooled colour difference, at 64 px
REACH_PX = 4  # ours: how far from its place an object that is asked for is looked for, at 64 px
OBJECT_MASKED = 0.5  # ours: an object of which the mask covers less is not looked for
BOX_SHARE = 0.3  # ours: nor is one whose box is a smaller part of the mask: nearly every fill has more, nearly every extended picture less
SHIFT_PX = 2  # ours: how far lettering may be displaced and still count as the same
INK = 0.2  # ours: how far a column's luma lies from the paper's where a letter touches it
DETAIL_FLOOR = 1e-4  # ours: power of the Laplacian under which a region counts as flat, about one grey level
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _scaled(pixels: int, image: Tensor) -> int:
    return max(1, round(pixels * min(image.shape[-2:]) / 64))


def luma(image: Tensor) -> Tensor:
    return (image * image.new_tensor(LUMA).view(3, 1, 1)).sum(0)  # [H, W]


def inside(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` [..., H, W] over the mask [1, H, W], a scalar."""
    return (values * mask).sum() / (mask.sum() * values.numel() / mask.numel()).clamp(min=1e-6)


def _gradients(image: Tensor) -> Tensor:
    """Sobel responses [2, H, W] of the luma."""
    kernel = image.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    padded = F.pad(luma(image)[None, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])[0]


def _edge_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    return -inside((_gradients(image) - _gradients(target)).abs(), mask)


def _seam_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    width = _scaled(RING_PX, image)
    outside = F.pad(1 - mask, (width,) * 4, value=0.0)  # the frame of the picture is no seam
    ring = mask * F.max_pool2d(outside[None], 2 * width + 1, stride=1)[0]
    return -inside((image - target).abs(), ring)


def _prompt_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    word = truth.get("word")
    if word and f'"{word["text"]}"' in prompt:
        return _letters_agreement(image, target, word)
    thing = truth.get("object")
    if thing and f"{thing['colour']} {thing['shape']}" in prompt and (found := _object_agreement(image, mask, truth)) is not None:
        return found
    cell = _scaled(POOL_PX, image)
    error = F.avg_pool2d((image - target)[None] * mask, cell)[0].abs()
    return -(error.sum() / (F.avg_pool2d(mask[None], cell).sum() * 3).clamp(min=1e-6))


def _object_agreement(image: Tensor, mask: Tensor, truth: dict[str, Any]) -> Tensor | None:
    """How much more of the asked colour lies on the asked shape than around it, at the best place nearby: 1 in full, 0 for nothing.

    None where the request is about more than the object: the mask covers less than half of it, or its box is a small part of the mask.
    """
    thing, reach = truth["object"], _scaled(REACH_PX, image)
    cover = torch.from_numpy(silhouette(thing["shape"], tuple(thing["box"]), image.shape[-1]))
    x0, y0, x1, y1 = thing["box"]
    if (cover * mask[0]).sum() < OBJECT_MASKED * cover.sum() or mask[0, y0:y1, x0:x1].sum() < BOX_SHARE * mask.sum():
        return None
    colour = image.new_tensor(COLOURS[thing["colour"]]) / 255
    tone = image.new_tensor(TONES[truth["background"]["tone"]]).mean(0) / 255
    distance = (image - colour.view(3, 1, 1)).norm(dim=0) / (tone - colour).norm()
    near = slice(max(0, y0 - 2 * reach), y1 + 2 * reach), slice(max(0, x0 - 2 * reach), x1 + 2 * reach)
    window = mask[0][near]  # [h, w], the masked pixels that are looked at
    like = (1 - distance[near]).clamp(min=0)  # [h, w]: 1 in the asked colour, 0 at the background's middle tone and beyond
    steps = torch.linspace(0, 2 * reach, 2 * REACH_PX + 1).round().long()
    moved = F.pad(cover, (reach,) * 4).unfold(0, cover.shape[0], 1).unfold(1, cover.shape[1], 1)  # [2 reach + 1, 2 reach + 1, H, W], a view
    places = moved[steps][:, steps][..., near[0], near[1]] * window  # [K, K, h, w]
    around = window - places
    on = (places * like).sum((-2, -1)) / places.sum((-2, -1)).clamp(min=1e-6)
    off = (around * like).sum((-2, -1)) / around.sum((-2, -1)).clamp(min=1e-6)
    allowed = places.sum((-2, -1)) >= OBJECT_MASKED * cover.sum()
    allowed[REACH_PX, REACH_PX] = True  # where it belongs: asked above
    return (on - off)[allowed].max()


def _letters_agreement(image: Tensor, target: Tensor, word: dict[str, Any]) -> Tensor:
    """Mean over the word's letters of how well each agrees with the target's, at its place: absolute correlation in its strip."""
    x0, y0, x1, y1 = word["box"]
    asked, seen = luma(target)[y0:y1, x0:x1], luma(image)[y0:y1, x0:x1]
    ink = (asked - asked.median()).abs().amax(0) > INK  # columns that letters touch
    first, last = int(ink.nonzero()[0]), int(ink.nonzero()[-1])
    edges = torch.linspace(first, last + 1, len(word["text"]) + 1).round().int().tolist()
    found = []
    for left, right in pairwise(edges):
        pair = torch.stack([asked[:, left:right].flatten(), seen[:, left:right].flatten()])
        found.append(torch.corrcoef(pair)[0, 1].nan_to_num().abs().double())  # white on black reads as well; blank is 0
    return torch.stack(found).mean()


def _detail_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    kernel = image.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])

    def detail(picture: Tensor) -> Tensor:
        padded = F.pad(luma(picture)[None, None], (1, 1, 1, 1), mode="replicate")
        return (inside(F.conv2d(padded, kernel[None, None])[0].pow(2), mask).double() + DETAIL_FLOOR).log10()

    return -(detail(image) - detail(target)).abs()


def _glyph_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    """Largest zero-normalised cross-correlation of the lettering with its template, over small displacements.

    The absolute value is taken: white on black reads as well as black on white. Zero where the scene has no word.
    """
    if "word" not in truth:
        return image.new_zeros(())
    x0, y0, x1, y1 = truth["word"]["box"]
    reach = _scaled(SHIFT_PX, image)
    template = luma(target)[y0 + reach : y1 - reach, x0 + reach : x1 - reach]
    template = template - template.mean()
    field = luma(image)[y0:y1, x0:x1]
    windows = field.unfold(0, template.shape[0], 1).unfold(1, template.shape[1], 1)
    windows = windows - windows.mean((-2, -1), keepdim=True)
    scale = windows.pow(2).sum((-2, -1)).sqrt() * template.pow(2).sum().sqrt()
    return ((windows * template).sum((-2, -1)).abs() / scale.clamp(min=1e-3)).max()


def _clean_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    return -inside((image - target).pow(2), mask)


MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any], str], Tensor]] = {
    "edge_agreement": _edge_agreement,
    "seam_agreement": _seam_agreement,
    "prompt_agreement": _prompt_agreement,
    "detail_agreement": _detail_agreement,
    "glyph_agreement": _glyph_agreement,
    "clean_agreement": _clean_agreement,
}


def agreement(name: str, image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> Tensor:
    """Score `image` against `target` inside `mask` by the named measure, as a scalar.

    Its gradient leads into `image`, but for a glyph measure where the scene has no word; on even patches those of letters are not finite.

    Args:
        name: a key of `MEASURES`, as the taxonomy's dimension names it.
        image: the edit pasted into its source, [3, H, W] in [0, 1].
        target: the perfect answer, [3, H, W] in [0, 1].
        mask: [1, H, W] in {0, 1}, one where pixels were made.
        truth: the scene's facts; glyphs read the sign's box from it.
        prompt: the request's; it says whether a word is asked for.

    Raises ConfigError for an unknown measure.
    """
    if name not in MEASURES:
        raise ConfigError(f"Unknown measure {name!r}.", f"The taxonomy may name {', '.join(MEASURES)}.")
    return MEASURES[name](image, target, mask, truth, prompt)


def measure(name: str, image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """`agreement` as a number."""
    return float(agreement(name, image, target, mask, truth, prompt))
