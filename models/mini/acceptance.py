"""Acceptance measures: a second family that says whether an edit is good, by formulas other than the scripted annotator's.

    accept("ssim_agreement", image, target, mask, truth, prompt)

The taxonomy names one per dimension as `accepted_by`; win rates are counted by them. A policy that wins by the annotator's formulas
(models/mini/measures.py) and loses by these has learned the formulas. Arguments are as there, and the request's prompt:
float32 images [3, H, W] in [0, 1], masks [1, H, W] in {0, 1}. Higher is better. Formulas: docs/measures.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from models.errors import ConfigError
from models.images import to_tensor
from models.mini.measures import inside, luma
from models.mini.scenes import COLOURS, SUPERSAMPLE, TONES, WORDS, draw_sign
from models.ocr import engine

SSIM_WINDOW = 7  # px, scikit-image's default
VISIBLE_DELTA_E = 10.0  # ours: CIEDE2000 at which two pixels plainly differ at a glance
BLOCK_PX = 8  # ours: side of the blocks whose cosine transform is looked at, as in JPEG
SPECTRUM_FLOOR = 1e-4  # ours: power under which a frequency counts as empty, about one grey level
OBJECT_SHARE = 0.01  # ours: an object of which the mask shows less than this share of the picture is not asked for
OCR_SCALE = 3  # ours: letters of 10 px are enlarged for a reader trained on 48 px lines


def lab(image: Tensor) -> np.ndarray:
    """CIE L*a*b* of [3, H, W], as [H, W, 3]."""
    return rgb2lab(image.clamp(0, 1).permute(1, 2, 0).numpy())


def _mean(values: np.ndarray, mask: Tensor) -> float:
    return float(inside(torch.from_numpy(np.ascontiguousarray(values)).float()[None], mask))


def _ssim_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    ours, wanted = luma(image).numpy(), luma(target).numpy()
    _, similarity = structural_similarity(ours, wanted, win_size=SSIM_WINDOW, data_range=1.0, full=True)
    return _mean(similarity, mask)


def _jump_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """Seam statistics: the colour steps from pixel to pixel across the mask's edge, against those of the target."""
    ours, wanted, area = lab(image), lab(target), mask[0].numpy().astype(bool)
    gaps = []
    for axis in (0, 1):
        crossing = np.diff(area.astype(np.int8), axis=axis) != 0
        step, asked = (np.linalg.norm(np.diff(picture, axis=axis), axis=-1)[crossing] for picture in (ours, wanted))
        gaps.append(np.abs(step - asked))
    found = np.concatenate(gaps)
    return -float(found.mean()) if found.size else 0.0


def _unlike(image: Tensor, target: Tensor) -> np.ndarray:
    """How visibly each pixel differs [H, W]: CIEDE2000, 1 from `VISIBLE_DELTA_E` on."""
    return np.minimum(deltaE_ciede2000(lab(image), lab(target)) / VISIBLE_DELTA_E, 1)


def _object_area(image: Tensor, truth: dict[str, Any]) -> np.ndarray:
    """Pixels [H, W] that are nearer to the object's colour than to any other named colour and to the tones of the background."""
    return nearest_colour(lab(image), truth) == truth["object"]["colour"]


def nearest_colour(colours: np.ndarray, truth: dict[str, Any]) -> np.ndarray:
    """Of L*a*b* values [..., 3] the names [...] of the colours nearest to them; empty where the background's tones are nearer."""
    names, tones = list(COLOURS), list(TONES[truth["background"]["tone"]])
    palette = rgb2lab(np.array([*COLOURS.values(), *tones, np.mean(tones, axis=0)]).reshape(-1, 1, 3) / 255).reshape(-1, 3)
    nearest = np.linalg.norm(colours[..., None, :] - palette, axis=-1).argmin(-1)
    return np.array([*names, "", "", ""])[nearest]


def _prompt_fulfilment(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """Is what the prompt names there: the object in its colour, shape and place, the background in its tone; or the word.

    Half of it is the overlap of the pixels classified as the object's colour with those of the target, half how far the other
    pixels look like the target's. The second alone counts where the mask shows next to nothing of the object. A sign that the
    prompt does not name is left out.
    """
    word = truth.get("word")
    if word and f'"{word["text"]}"' in prompt:
        return word_margin(image, word)
    area = mask[0].numpy().astype(bool)
    if word:
        x0, y0, x1, y1 = word["box"]
        area[y0:y1, x0:x1] = False
    there = _object_area(target, truth) & area
    rest = area & ~there
    likeness = 1 - float(_unlike(image, target)[rest].mean()) if rest.any() else 1.0
    if there.sum() < OBJECT_SHARE * there.size:
        return likeness
    found = _object_area(image, truth) & area
    return ((found & there).sum() / (found | there).sum() + likeness) / 2


@lru_cache(maxsize=256)
def _template(word: str, width: int, height: int, dark: bool) -> Tensor:
    """Luma [height, width] of a sign with this word."""
    big = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw_sign(big, (0, 0, width, height), word, dark, SUPERSAMPLE)
    return luma(to_tensor(big.resize((width, height), Image.Resampling.BOX)))


def word_margin(image: Tensor, word: dict[str, Any]) -> float:
    """Template classification: correlation with the asked word minus the largest with any other word.

    From 0, where another word is nearer or there is none, to 1: a wrong word is no better than a blank sign, and no worse.
    """
    x0, y0, x1, y1 = word["box"]
    seen = luma(image)[y0:y1, x0:x1].flatten()

    def likeness(text: str) -> float:
        template = _template(text, x1 - x0, y1 - y0, word["dark"]).flatten()
        return float(torch.corrcoef(torch.stack([seen, template]))[0, 1].nan_to_num().abs())  # white on black reads as well; blank: 0

    return max(0.0, likeness(word["text"]) - max(likeness(other) for other in WORDS if other != word["text"]))


def _spectrum_agreement(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """Blur, noise and grid textures show in the power of the frequencies: mean difference of its logarithm, over blocks of the mask."""

    def blocks(plane: Tensor) -> Tensor:
        return plane.unfold(0, BLOCK_PX, BLOCK_PX).unfold(1, BLOCK_PX, BLOCK_PX).flatten(0, 1)  # [N, BLOCK_PX, BLOCK_PX]

    touched = blocks(mask[0]).amax((1, 2)) > 0
    steps = np.arange(BLOCK_PX)
    band = np.rint(np.hypot(steps[:, None], steps[None])).astype(int)  # 0 is the mean, which is no texture

    def power(picture: Tensor) -> np.ndarray:
        seen = blocks(torch.where(mask[0] > 0, luma(picture), luma(target)))[touched].numpy()  # outside the mask both are the target
        squares = dctn(seen, axes=(1, 2), norm="ortho") ** 2
        return np.array([squares[:, band == index].mean() for index in range(1, BLOCK_PX)])

    return -float(np.abs(np.log10(power(image) + SPECTRUM_FLOOR) - np.log10(power(target) + SPECTRUM_FLOOR)).mean())


def _word_read(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """How much of the word OCR reads: similarity of the strings (Ratcliff-Obershelp, 0 to 1), case ignored, times its confidence."""
    if "word" not in truth:
        return 0.0
    x0, y0, x1, y1 = truth["word"]["box"]
    line = image[:, y0:y1, x0:x1].clamp(0, 1)
    line = torch.nn.functional.interpolate(line[None], scale_factor=OCR_SCALE, mode="bicubic", antialias=True)[0].clamp(0, 1)
    pixels = (line.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[:, :, ::-1]  # the network takes BGR
    found = engine()(pixels, use_det=False, use_cls=False, use_rec=True)
    text, confidence = (found.txts[0], float(found.scores[0])) if found.txts else ("", 0.0)
    return confidence * difflib.SequenceMatcher(None, text.casefold(), truth["word"]["text"].casefold()).ratio()


def _nothing_left(image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """Whether anything is to be seen there: minus how visibly the masked pixels differ from the clean background."""
    return -_mean(_unlike(image, target), mask)


ACCEPTANCE: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any], str], float]] = {
    "ssim_agreement": _ssim_agreement,
    "jump_agreement": _jump_agreement,
    "prompt_fulfilment": _prompt_fulfilment,
    "spectrum_agreement": _spectrum_agreement,
    "word_read": _word_read,
    "nothing_left": _nothing_left,
}


def accept(name: str, image: Tensor, target: Tensor, mask: Tensor, truth: dict[str, Any], prompt: str) -> float:
    """Score `image` against `target` inside `mask` by the named acceptance measure; arguments as `measures.measure`, and the prompt.

    Raises ConfigError for an unknown measure.
    """
    if name not in ACCEPTANCE:
        raise ConfigError(f"Unknown acceptance measure {name!r}.", f"The taxonomy may name {', '.join(ACCEPTANCE)}.")
    return ACCEPTANCE[name](image, target, mask, truth, prompt)
