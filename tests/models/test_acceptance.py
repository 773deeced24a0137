"""The acceptance measures: what is better must score better, whatever the annotator's own formulas say."""

from itertools import count, islice
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ConfigError
from models.images import to_mask, to_tensor
from models.mini.acceptance import ACCEPTANCE, accept
from models.mini.measures import MEASURES
from models.mini.scenes import Scene, render_scene

OF_PICTURES = [name for name in ACCEPTANCE if name != "word_read"]
BORDER = 14  # px of the frame that an extension makes


def boxed(scene: Scene) -> Tensor:
    """A mask [1, 64, 64] over the object's box and 2 px around it."""
    mask = torch.zeros(1, 64, 64)
    x0, y0, x1, y1 = scene.truth["object"]["box"]
    mask[:, max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = 1
    return mask


def border() -> Tensor:
    mask = torch.ones(1, 64, 64)
    mask[:, BORDER:-BORDER, BORDER:-BORDER] = 0
    return mask


def perfect(scene: Scene, name: str) -> Tensor:
    return to_tensor(scene.clean if name == "nothing_left" else scene.image)


def scenes(number: int, worded: bool = False) -> list[Scene]:
    found = (render_scene(seed) for seed in count())
    return list(islice((scene for scene in found if not worded or scene.words), number))


def score(name: str, scene: Scene, image: Tensor, mask: Tensor, prompt: str = "") -> float:
    target = perfect(scene, name)
    return accept(name, torch.where(mask > 0, image, target), target, mask, scene.truth, prompt or scene.caption)


def asked(scene: Scene) -> str:
    return f'the word "{scene.words}"'


def noise(seed: int = 0) -> Tensor:
    return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_the_two_families_share_no_measure() -> None:
    assert not set(ACCEPTANCE) & set(MEASURES)


@pytest.mark.parametrize("mask", [boxed, lambda scene: border()], ids=["box", "border"])
@pytest.mark.parametrize("name", OF_PICTURES)
def test_more_damage_never_scores_better_on_average(name: str, mask) -> None:
    """An edit with a higher masked error must not win: the same noise of growing size loses on every step, mean over scenes."""
    means = [
        mean(score(name, s, (perfect(s, name) + size * noise()).clamp(0, 1), mask(s)) for s in scenes(12)) for size in (0, 0.05, 0.15, 0.4)
    ]
    assert means == sorted(means, reverse=True) and means[0] > means[1] + 1e-3 > means[3]


@pytest.mark.parametrize("name", ["ssim_agreement", "spectrum_agreement", "prompt_fulfilment", "nothing_left"])
def test_blur_loses(name: str) -> None:
    def blurred(picture: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(picture[None], (2,) * 4, mode="replicate"), 5, 1)[0]

    lost = [score(name, s, perfect(s, name), boxed(s)) - score(name, s, blurred(perfect(s, name)), boxed(s)) for s in scenes(12)]
    assert mean(lost) > 0.05 and min(lost) >= 0


def test_the_frame_of_a_picture_counts_as_much_as_the_rest_of_an_extension() -> None:
    outer = torch.ones(1, 64, 64)
    outer[:, 6:-6, 6:-6] = 0

    def lost(where: Tensor) -> float:
        damaged = [(s, to_tensor(s.image) + 0.2 * noise() * where) for s in scenes(12)]
        return -mean(score("spectrum_agreement", s, picture.clamp(0, 1), border()) for s, picture in damaged)

    assert 0.5 < lost(outer) / lost(border() - outer) < 2


def test_a_seam_shows_as_a_step_at_the_edge_only() -> None:
    scene = scenes(1)[0]
    picture, mask = to_tensor(scene.image), boxed(scene)
    inner = -F.max_pool2d(-mask[None], 5, stride=1, padding=2)[0]  # two pixels in from the edge
    shifted = (picture + 0.2).clamp(0, 1)
    assert score("jump_agreement", scene, shifted, mask) < -5
    assert score("jump_agreement", scene, torch.where(inner > 0, shifted, picture), mask) == pytest.approx(0.0, abs=1e-6)


def test_the_prompt_asks_for_colour_place_and_presence() -> None:
    for scene in scenes(12):
        picture, mask = to_tensor(scene.image), boxed(scene)
        missing = score("prompt_fulfilment", scene, to_tensor(scene.clean), mask)
        recoloured = torch.where(to_mask(scene.object_mask) > 0, 1 - picture, picture)
        assert score("prompt_fulfilment", scene, picture, mask) == pytest.approx(1.0)
        assert missing < 0.75 and score("prompt_fulfilment", scene, recoloured, mask) < 0.75


def test_a_caption_does_not_ask_for_the_sign() -> None:
    """Nor may the paper of a sign pass for a white object. The same sign damaged costs nothing, the background does."""
    for scene in scenes(12, worded=True):
        x0, y0, x1, y1 = scene.truth["word"]["box"]
        mask = torch.zeros(1, 64, 64)
        mask[:, max(0, y0 - 4) : y1 + 4] = 1
        wiped, spoiled = to_tensor(scene.image), to_tensor(scene.image)
        wiped[:, y0:y1, x0:x1] = 0.5
        spoiled = torch.where((wiped == to_tensor(scene.image)).all(0), 1 - spoiled, spoiled)
        assert score("prompt_fulfilment", scene, wiped, mask) == pytest.approx(1.0)
        assert score("prompt_fulfilment", scene, spoiled, mask) < 0.5


def test_where_the_mask_shows_no_object_one_stray_pixel_decides_nothing() -> None:
    scene = next(s for s in scenes(60) if not s.words and min(s.truth["object"]["box"][:2]) > 24)
    mask = torch.zeros(1, 64, 64)
    mask[:, :20, :20] = 1
    stray = to_tensor(scene.image)
    x, y = (int(v) for v in torch.tensor(scene.truth["object"]["box"]).view(2, 2).float().mean(0))
    stray[:, 3, 3] = stray[:, y, x]
    assert 0.98 < score("prompt_fulfilment", scene, stray, mask) <= 1


def test_a_left_over_object_counts_by_what_is_seen_of_it() -> None:
    for scene in scenes(6):
        mask = to_mask(scene.object_mask)
        left = score("nothing_left", scene, to_tensor(scene.image), mask)
        half = torch.where(torch.arange(64) % 2 == 0, to_tensor(scene.image), to_tensor(scene.clean))
        faint = 0.9 * to_tensor(scene.clean) + 0.1 * to_tensor(scene.image)
        assert score("nothing_left", scene, to_tensor(scene.clean), mask) == 0
        assert left < score("nothing_left", scene, half, mask) < -0.2
        assert left < score("nothing_left", scene, faint, mask) < 0


def test_letters_are_read_and_other_words_are_not_taken_for_them() -> None:
    """The template and the reader agree: the right word wins; another word and a blank sign lose, neither to the other's gain."""
    signs = scenes(6, worded=True)
    for scene, other in zip(signs, [*signs[1:], signs[0]], strict=True):
        mask = to_mask(scene.words_mask)
        swapped, blank = to_tensor(scene.image), to_tensor(scene.image)
        x0, y0, x1, y1 = scene.truth["word"]["box"]
        u0, v0, u1, v1 = other.truth["word"]["box"]
        swapped[:, y0:y1, x0:x1] = to_tensor(other.image)[:, v0:v1, u0:u1]
        blank[:, y0:y1, x0:x1] = 0.9
        assert score("word_read", scene, to_tensor(scene.image), mask) > 0.6 and score("word_read", scene, blank, mask) < 0.3
        assert score("prompt_fulfilment", scene, to_tensor(scene.image), mask, asked(scene)) > 0.1
        assert score("prompt_fulfilment", scene, blank, mask, asked(scene)) == 0
        if scene.words != other.words:
            assert score("word_read", scene, swapped, mask) < 0.6
            assert score("prompt_fulfilment", scene, swapped, mask, asked(scene)) < 0.1


def test_an_unknown_measure_is_named() -> None:
    with pytest.raises(ConfigError, match="beauty"):
        accept("beauty", torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(1, 8, 8), {}, "")
