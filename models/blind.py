"""Measures that need no target, for pictures whose perfect edit nobody knows. Higher is better.

    blind("seam_step", Edit(image, source, mask, prompt), clip)

The taxonomy names two per dimension: win rates under `evidence: blind` are counted by `measured_by`, which also looks at a policy's
checkpoints where it is `RELIABLE`; the second opinion is `confirmed_by`. None looks at the source inside the mask, with one exception:
what `object_gone` compares with is the thing that was to be removed. Nobody labels with them. Formulas, and how far each agrees with
the known truth of procedural scenes: docs/measures.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve, gaussian_filter, uniform_filter
from scipy.stats import wasserstein_distance
from skimage.color import rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from models.clip import Clip
from models.errors import ConfigError
from models.ocr import likeness, read, words_asked

# Every value below is ours. Lengths are for 64 px and grow with the picture.
NEAR_PX = 3  # how far outside the mask's edge jumps count as nearby, and how wide the strips on its two sides are
CLEAR_PX = 3  # distance from the edge at which a gradient is that of one side
PATCH_SIDE = 64  # px of the shorter side at which patches are compared, whatever the picture's size
PATCH_PX = 7
NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])  # Immerkaer's: blind to planes and straight edges
NOISE_FLOOR = 0.003  # residue under which there is no noise to speak of, about one grey level
MSCN_SIGMA = 7 / 6  # px, as in BRISQUE
CROP_MARGIN = 0.25  # of the mask's box, on every side: what CLIP sees around it
SSIM_WINDOW = 7  # px
SCALES = 3  # of the similarity outside the mask: whole, half and quarter size
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Edit(NamedTuple):
    """What was asked and what came of it. float32: pictures [3, H, W] in [0, 1], `mask` [1, H, W] in {0, 1}."""

    image: Tensor  # the edit pasted into its source
    source: Tensor
    mask: Tensor
    prompt: str


def _scaled(pixels: int, image: Tensor) -> int:
    return max(1, round(pixels * min(image.shape[-2:]) / 64))


def _luma(image: Tensor) -> np.ndarray:
    return (image * image.new_tensor(LUMA).view(3, 1, 1)).sum(0).numpy()


def _lab(image: Tensor) -> np.ndarray:
    return rgb2lab(image.clamp(0, 1).permute(1, 2, 0).numpy())


class _Edge:
    """The steps over the mask's edge: `inner` [N, 2] are masked pixels, `out` [N, 2] the unit steps that lead out of the mask."""

    def __init__(self, mask: Tensor):
        self.area = mask[0].numpy() > 0
        height, width = self.area.shape
        beyond = np.pad(self.area, 1, constant_values=True)  # the frame of the picture is no edge
        inner, out = [], []
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            found = np.argwhere(self.area & ~beyond[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width])
            inner.append(found)
            out.append(np.broadcast_to((dy, dx), found.shape))
        self.inner, self.out = np.concatenate(inner), np.concatenate(out)

    def at(self, values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """`values` [H, W, ...] `distance` px from `inner` along the step (negative: inwards), and which are on their side of the edge."""
        places = self.inner + distance * self.out
        limits = np.array(self.area.shape) - 1
        within = ((places >= 0) & (places <= limits)).all(1)
        y, x = np.clip(places, 0, limits).T
        return values[y, x], within & (self.area[y, x] == (distance <= 0))


def _seam_step(edit: Edit, clip: Clip | None) -> float:
    """Gradient jump over the edge, beyond the jumps nearby outside: a seam is a step where the picture has none."""
    edge, lab = _Edge(edit.mask), _lab(edit.image)
    if not len(edge.inner):
        return 0.0
    rows = [edge.at(lab, distance) for distance in range(_scaled(NEAR_PX, edit.image) + 2)]
    jumps = [np.linalg.norm(near - far, axis=-1) for (near, _), (far, _) in itertools.pairwise(rows)]
    valid = np.logical_and.accumulate([there for _, there in rows[1:]])[1:]  # a row that meets the mask or the frame again ends there
    nearby = np.sum(np.array(jumps[1:]) * valid, axis=0) / np.maximum(valid.sum(axis=0), 1)
    return -float(np.abs(jumps[0] - nearby)[valid[0]].mean()) if valid[0].any() else 0.0


def _side_colours(edit: Edit, clip: Clip | None) -> float:
    """Light and colour on the two sides of the edge: distance of the local mean colours of two strips."""
    edge, lab = _Edge(edit.mask), _lab(edit.image)
    if not len(edge.inner):
        return 0.0
    side = 2 * _scaled(NEAR_PX, edit.image) + 1

    def mean_over(part: np.ndarray) -> np.ndarray:
        weight = uniform_filter(part.astype(float), side, mode="constant")[..., None]
        return uniform_filter(lab * part[..., None], (side, side, 0), mode="constant") / np.maximum(weight, 1e-9)

    within, _ = edge.at(mean_over(edge.area), 0)
    without, _ = edge.at(mean_over(~edge.area), 1)
    return -float(np.linalg.norm(within - without, axis=-1).mean())


def _contour_continuity(edit: Edit, clip: Clip | None) -> float:
    """Do the contours that reach the edge go on inside: difference of the smoothed luma's gradients on its two sides."""
    edge = _Edge(edit.mask)
    clear = _scaled(CLEAR_PX, edit.image)
    gradients = np.stack(np.gradient(gaussian_filter(_luma(edit.image), _scaled(1, edit.image))), axis=-1)
    (within, there), (without, beyond) = edge.at(gradients, -clear), edge.at(gradients, 1 + clear)
    both = there & beyond
    return -float(np.linalg.norm(within - without, axis=-1)[both].mean()) if both.any() else 0.0


def _patch_likeness(edit: Edit, clip: Clip | None) -> float:
    """Does what was made look like something in the rest: patches of colour."""
    return _coherence(edit.image, edit.mask, centred=False)


def _shape_likeness(edit: Edit, clip: Clip | None) -> float:
    """Are the contours that were made like some in the rest: patches of luma, each less its mean, so that light and colour do not count."""
    return _coherence(torch.from_numpy(_luma(edit.image))[None], edit.mask, centred=True)


def _coherence(picture: Tensor, mask: Tensor, *, centred: bool) -> float:
    """Minus the distance of each patch in the mask to its nearest outside, as bidirectional similarity has it (Simakov et al. 2008)."""
    scale = PATCH_SIDE / min(picture.shape[-2:])
    size = [round(side * scale) for side in picture.shape[-2:]]
    small = F.interpolate(picture[None], size, mode="bilinear", antialias=scale < 1)
    area = F.adaptive_max_pool2d(mask[None], size)
    margin = PATCH_PX // 2
    patches = F.unfold(small, PATCH_PX)[0].T  # [P, C * PATCH_PX ** 2]
    if centred:
        patches = patches - patches.mean(1, keepdim=True)
    covered = F.unfold(area, PATCH_PX)[0].amax(0) > 0
    made = patches[area[0, 0, margin : size[0] - margin, margin : size[1] - margin].flatten() > 0]
    known = patches[~covered]
    if not len(made) or not len(known):
        return 0.0
    nearest = torch.cat([torch.cdist(part, known).amin(1) for part in made.split(1024)])
    return -float(nearest.mean()) / patches.shape[1] ** 0.5


def _noise_likeness(edit: Edit, clip: Clip | None) -> float:
    """Grain and sharpness as in the rest: ratio of the noise levels (Immerkaer 1996, the median instead of the mean) inside and outside."""
    residue, area = np.abs(convolve(_luma(edit.image), NOISE_KERNEL)), edit.mask[0].numpy() > 0
    if not area.any() or area.all():
        return 0.0
    return -abs(math.log((np.median(residue[area]) + NOISE_FLOOR) / (np.median(residue[~area]) + NOISE_FLOOR)))


def _local_contrast_likeness(edit: Edit, clip: Clip | None) -> float:
    """Naturalness as BRISQUE sees it (Mittal et al. 2012), the picture's own rest for a model: earth mover's distance between the
    normalised luminances (MSCN) inside the mask and outside."""
    luma, area = _luma(edit.image).astype(float), edit.mask[0].numpy() > 0
    centred = luma - gaussian_filter(luma, MSCN_SIGMA)
    spread = np.sqrt(gaussian_filter(centred**2, MSCN_SIGMA))
    mscn = centred / (spread + 1 / 255)
    return -float(wasserstein_distance(mscn[area], mscn[~area])) if area.any() and not area.all() else 0.0


def _box(mask: Tensor, margin: float) -> tuple[slice, slice]:
    """The mask's bounding box, `margin` of its sides wider everywhere, cut at the picture's frame."""
    height, width = mask.shape[-2:]
    rows, columns = (torch.nonzero(mask[0].amax(axis)).flatten() for axis in (1, 0))
    if not len(rows):
        return slice(0, height), slice(0, width)
    found = []
    for places, limit in ((rows, height), (columns, width)):
        first, last = int(places[0]), int(places[-1]) + 1
        extra = round(margin * (last - first))
        found.append(slice(max(0, first - extra), min(limit, last + extra)))
    return found[0], found[1]


def _crop(picture: Tensor, mask: Tensor, margin: float = CROP_MARGIN) -> Tensor:
    rows, columns = _box(mask, margin)
    return picture[:, rows, columns]


def _words_read(edit: Edit, clip: Clip | None) -> float:
    """The mask's box read as one line, against the words that the prompt quotes."""
    return likeness(read(_crop(edit.image, edit.mask, 0.0), find=False), words_asked(edit.prompt))


def _words_found(edit: Edit, clip: Clip | None) -> float:
    """The lines that a text detector finds in and around the mask, or all of it as one line, against the words that the prompt quotes."""
    around = _crop(edit.image, edit.mask)
    return likeness(read(around, find=True) or read(around, find=False), words_asked(edit.prompt))


def _prompt_followed(edit: Edit, clip: Clip | None) -> float:
    """The words are read where the prompt quotes some; else the CLIP score of what lies in and around the mask."""
    return _words_read(edit, clip) if words_asked(edit.prompt) else _cosine(clip, _crop(edit.image, edit.mask), edit.prompt)


def _clip_score(edit: Edit, clip: Clip | None) -> float:
    """CLIP score of the whole picture."""
    return _cosine(clip, edit.image, edit.prompt)


def _cosine(clip: Clip | None, picture: Tensor, prompt: str) -> float:
    return float(_given(clip).image(picture) @ _given(clip).text(prompt))


def _object_gone(edit: Edit, clip: Clip | None) -> float:
    """Minus the likeness, to CLIP, of what is in and around the mask now to what was there: falls when the object is gone."""
    now, before = (_given(clip).image(_crop(picture, edit.mask)) for picture in (edit.image, edit.source))
    return -float(now @ before)


def _given(clip: Clip | None) -> Clip:
    if clip is None:
        raise ConfigError("This measure needs a CLIP checkpoint.", "Name one as `models: {clip: ...}` in the preset.")
    return clip


BLIND: dict[str, Callable[[Edit, Clip | None], float]] = {
    "seam_step": _seam_step,
    "side_colours": _side_colours,
    "contour_continuity": _contour_continuity,
    "patch_likeness": _patch_likeness,
    "shape_likeness": _shape_likeness,
    "noise_likeness": _noise_likeness,
    "local_contrast_likeness": _local_contrast_likeness,
    "words_read": _words_read,
    "words_found": _words_found,
    "prompt_followed": _prompt_followed,
    "clip_score": _clip_score,
    "object_gone": _object_gone,
}
# Of those that the taxonomy names under `measured_by`, watching a policy rests on these alone: on scenes their agreement with the known
# truth lies above .70 with its whole interval, that of the others does not (docs/measures.md).
RELIABLE = frozenset({"seam_step", "patch_likeness", "words_read"})
WITH_CLIP = frozenset({"prompt_followed", "clip_score", "object_gone"})


def blind(name: str, edit: Edit, clip: Clip | None) -> float:
    """Score an edit by the named measure. Raises ConfigError for an unknown one and for one of `WITH_CLIP` without a `clip`."""
    if name not in BLIND:
        raise ConfigError(f"Unknown blind measure {name!r}.", f"The taxonomy may name {', '.join(BLIND)}.")
    return BLIND[name](edit, clip)


def outside_similarity(raw: Tensor, source: Tensor, mask: Tensor) -> float:
    """How alike the raw edit and its source look outside the mask: SSIM of the luma, mean over the kept pixels and over scales, up to 1.

    No network: those that such distances are made of (LPIPS, DISTS) come with torchvision, and CLIP's patches are too coarse to
    see blur. The mask is filled with the source first, so that no window sees what was made. 1 where nothing is kept.
    """
    kept = torch.where(mask > 0, source, raw)
    values = []
    for scale in range(SCALES):
        size = [side >> scale for side in source.shape[-2:]]
        outside = F.interpolate(1 - mask[None], size, mode="area")[0, 0].numpy() > 0.5
        if min(size) < SSIM_WINDOW or not outside.any():
            continue
        ours, theirs = (_luma(F.interpolate(picture[None], size, mode="area")[0]) for picture in (kept, source))
        _, similarity = structural_similarity(ours, theirs, win_size=SSIM_WINDOW, data_range=1.0, full=True)
        values.append(float(similarity[outside].mean()))
    return sum(values) / len(values) if values else 1.0
