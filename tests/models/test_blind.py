"""The measures that need no target: what looks better must score better, and the source inside the mask must not be asked."""

from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from models.blind import BLIND, WITH_CLIP, Edit, blind, outside_similarity
from models.clip import Clip
from models.errors import BrokenWeights, ConfigError, MissingWeights
from models.images import to_mask, to_pil, to_tensor
from models.mini.photos import photo_crops
from models.mini.scenes import Scene, render_scene
from models.ocr import words_asked
from tests.models.tiny_clip import save_tiny_clip

OF_PICTURES = sorted(set(BLIND) - WITH_CLIP - {"words_read", "words_found"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(checkpoint: Path) -> Clip:
    return Clip.load(checkpoint)


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    return [to_tensor(photo.image) for photo in islice(photo_crops(64, 1, 0), 8)]


def box(y0: int, x0: int, y1: int, x1: int) -> Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, y0:y1, x0:x1] = 1
    return mask


HOLE = box(16, 16, 48, 48)


def edit(picture: Tensor, inside: Tensor, mask: Tensor = HOLE, prompt: str = "a wall") -> Edit:
    return Edit(torch.where(mask > 0, inside.clamp(0, 1), picture), picture, mask, prompt)


def noise() -> Tensor:
    return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))


def worse(name: str, photos: list[Tensor], damage: Callable[[Tensor], Tensor]) -> float:
    """How much lower a damaged inside scores than the photograph's own, mean over photographs."""
    return mean(blind(name, edit(p, p), None) - blind(name, edit(p, damage(p)), None) for p in photos)


@pytest.mark.parametrize("name", ["seam_step", "side_colours"])
def test_another_colour_inside_is_a_seam(name: str, photos: list[Tensor]) -> None:
    assert worse(name, photos, lambda p: p + 0.3) > worse(name, photos, lambda p: p + 0.1) > 0


def test_a_seam_is_measured_against_the_picture_around_it() -> None:
    """A step of the size that the texture has everywhere is none; the same step on a plain wall is one."""
    rough, plain = (torch.arange(64) % 2).float().expand(3, 64, 64) * 0.4 + 0.3, torch.full((3, 64, 64), 0.5)
    seen = [blind("seam_step", edit(picture, picture + shift), None) for picture, shift in ((rough, 0.0), (plain, 0.0), (plain, 0.4))]
    assert seen[0] > -15 and seen[1] == 0 and seen[2] < -30


@pytest.mark.parametrize("name", ["patch_likeness", "shape_likeness", "noise_likeness", "local_contrast_likeness", "contour_continuity"])
def test_noise_does_not_belong_to_a_photograph(name: str, photos: list[Tensor]) -> None:
    assert worse(name, photos, lambda p: p + 0.3 * noise()) > 0


def test_blur_lacks_the_grain_of_the_rest(photos: list[Tensor]) -> None:
    assert worse("noise_likeness", photos, lambda p: F.avg_pool2d(F.pad(p[None], (3,) * 4, mode="replicate"), 7, 1)[0]) > 0


def test_a_hole_filled_like_its_surroundings_is_better_removed_than_one_that_keeps_its_object() -> None:
    scenes = islice((render_scene(seed) for seed in count()), 12)
    for scene in scenes:
        mask, kept = to_mask(scene.object_mask), to_tensor(scene.image)
        clean, left = (blind("patch_likeness", edit(kept, inside, mask), None) for inside in (to_tensor(scene.clean), kept))
        assert clean > left


@pytest.mark.parametrize("name", OF_PICTURES)
def test_the_source_inside_the_mask_is_not_asked(name: str, photos: list[Tensor]) -> None:
    seen = edit(photos[0], photos[1])
    other = seen._replace(source=torch.where(HOLE > 0, photos[2], photos[0]))
    assert blind(name, seen, None) == blind(name, other, None)


@pytest.mark.parametrize("mask", [torch.ones(1, 64, 64), torch.zeros(1, 64, 64), box(0, 0, 1, 1), 1 - box(1, 1, 63, 63)])
def test_any_mask_has_a_finite_measure(clip: Clip, photos: list[Tensor], mask: Tensor) -> None:
    found = {name: blind(name, edit(photos[0], photos[1], mask, 'the word "open"'), clip) for name in BLIND}
    assert all(torch.isfinite(torch.tensor(value)) for value in found.values()), found
    assert 0 <= outside_similarity(photos[1], photos[0], mask) <= 1


def signs(number: int) -> list[Scene]:
    return list(islice((scene for scene in map(render_scene, count()) if scene.words), number))


@pytest.mark.parametrize("name", ["words_read", "words_found", "prompt_followed"])
def test_the_word_that_was_asked_for_is_read(name: str) -> None:
    right, wrong, wiped = [], [], []
    for scene in signs(2):
        picture, mask = to_tensor(scene.image), to_mask(scene.words_mask)
        right.append(blind(name, edit(picture, picture, mask, f'the word "{scene.words}"'), None))
        wrong.append(blind(name, edit(picture, picture, mask, "the word “zzzz”"), None))
        wiped.append(blind(name, edit(picture, torch.full_like(picture, 0.5), mask, f'the word "{scene.words}"'), None))
    assert mean(right) > 0.5 > mean(wrong) and mean(right) > 0.5 > mean(wiped)


def test_words_are_what_is_quoted() -> None:
    assert words_asked('a "big" sign that says “open now”') == "big open now"
    assert words_asked("a 3' by 4' sign") == ""
    scene = signs(1)[0]
    picture = to_tensor(scene.image)
    assert blind("words_read", edit(picture, picture, to_mask(scene.words_mask), "a sign"), None) > 0.5  # anything legible will do


def test_clip_cosines_are_the_librarys(checkpoint: Path, clip: Clip, photos: list[Tensor]) -> None:
    model, tokenizer = CLIPModel.from_pretrained(checkpoint), CLIPTokenizer.from_pretrained(checkpoint)
    pixels = CLIPImageProcessorPil.from_pretrained(checkpoint)([to_pil(photos[0])], return_tensors="pt")
    prompt = "a cat " * 60  # longer than the tower reads
    with torch.no_grad():
        theirs = model(**tokenizer([prompt], truncation=True, return_tensors="pt"), **pixels).logits_per_image / model.logit_scale.exp()
    assert blind("clip_score", Edit(photos[0], photos[1], HOLE, prompt), clip) == pytest.approx(theirs.item(), abs=1e-5)
    assert blind("prompt_followed", Edit(photos[0], photos[1], torch.ones(1, 64, 64), prompt), clip) == pytest.approx(
        theirs.item(), abs=1e-5
    )


def test_an_object_that_stays_is_not_gone(clip: Clip, photos: list[Tensor]) -> None:
    same, other = (blind("object_gone", edit(photos[0], inside), clip) for inside in (photos[0], photos[1]))
    assert same == pytest.approx(-1, abs=1e-5) and other > same


@pytest.mark.parametrize("name", sorted(WITH_CLIP))
def test_a_measure_that_needs_clip_says_so(name: str, photos: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"models: \{clip"):
        blind(name, edit(photos[0], photos[1]), None)


def test_an_unknown_measure_is_named(photos: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="beauty"):
        blind("beauty", edit(photos[0], photos[1]), None)


def test_a_broken_clip_folder_is_named(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenWeights, match=str(folder)):
        Clip.load(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(MissingWeights, match="preprocessor_config"):
        Clip.load(folder)


def test_the_outside_is_kept_or_not(photos: list[Tensor]) -> None:
    picture, blurred = photos[0], F.avg_pool2d(F.pad(photos[0][None], (1,) * 4, mode="replicate"), 3, 1)[0]
    assert outside_similarity(torch.where(HOLE > 0, photos[1], picture), picture, HOLE) == pytest.approx(1)
    faint = outside_similarity(picture + 0.02 * noise(), picture, HOLE)
    assert 1 > faint > outside_similarity(picture + 0.2 * noise(), picture, HOLE)
    assert outside_similarity(blurred, picture, HOLE) < 0.99
