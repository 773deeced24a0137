"""The mini world: scenes say the truth about themselves, and measures rank edits as their formulas say."""

import numpy as np
import pytest
import torch

from models.errors import ConfigError
from models.images import to_mask, to_tensor
from models.mini.acceptance import ACCEPTANCE
from models.mini.measures import MEASURES, measure
from models.mini.photos import PHOTOGRAPHS, photo_crops
from models.mini.scenes import COLOURS, SHAPES, WORDS, render_scene
from models.taxonomy import Taxonomy

PROMPT = "a red circle"  # asks for no word


def _worded(first: int = 0):
    return next(scene for scene in map(render_scene, range(first, first + 50)) if scene.words)


def test_a_seed_is_a_scene():
    one, two, other = render_scene(5), render_scene(5), render_scene(6)
    assert one.image.tobytes() == two.image.tobytes() and one.caption == two.caption
    assert one.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_picture_and_clean_picture_differ_on_the_object_and_nowhere_else(seed):
    scene = render_scene(seed)
    changed = (to_tensor(scene.image) - to_tensor(scene.clean)).abs().amax(0) > 0.04
    assert changed.any() and not (changed & (to_mask(scene.object_mask)[0] == 0)).any()
    x0, y0, x1, y1 = scene.truth["object"]["box"]
    rows, columns = np.nonzero(changed.numpy())
    assert x0 - 1 <= columns.min() and columns.max() <= x1 + 1 and y0 - 1 <= rows.min() and rows.max() <= y1 + 1


@pytest.mark.parametrize("seed", range(10))
def test_another_object_or_word_changes_nothing_else(seed):
    scene = render_scene(seed)
    thing, word = scene.truth["object"], scene.truth.get("word")
    instead = {"colour": "red" if thing["colour"] != "red" else "blue"} | (
        {"word": "CAT" if word["text"] != "CAT" else "DOG"} if word else {}
    )
    other = render_scene(seed, instead=instead)
    assert other.truth == scene.truth | {"object": thing | {"colour": instead["colour"]}} | (
        {"word": word | {"text": instead["word"]}} if word else {}
    )
    changed = (to_tensor(scene.image) - to_tensor(other.image)).abs().amax(0) > 0.04
    may = to_mask(scene.object_mask)[0] + (to_mask(scene.words_mask)[0] if scene.words_mask else 0)
    assert changed.any() and not (changed & (may == 0)).any() and instead["colour"] in other.caption


@pytest.mark.parametrize("seed", range(20))
def test_the_caption_names_what_is_there(seed):
    scene = render_scene(seed)
    thing = scene.truth["object"]
    assert thing["colour"] in COLOURS and thing["shape"] in SHAPES
    assert f"{thing['colour']} {thing['shape']}" in scene.caption
    inside = to_tensor(scene.image)[:, to_mask(scene.object_mask)[0] > 0]
    wanted = torch.tensor(COLOURS[thing["colour"]]) / 255
    assert ((inside - wanted[:, None]).abs().amax(0) < 0.02).float().mean() > 0.3  # the object is of that colour


def test_a_sign_never_hides_the_object_and_carries_its_word():
    for scene in filter(lambda scene: scene.words, map(render_scene, range(60))):
        assert scene.words in WORDS and scene.truth["word"]["text"] == scene.words
        assert scene.words_mask is not None
        assert not (to_mask(scene.words_mask) * to_mask(scene.object_mask)).any()


def test_crops_are_of_the_size_asked_and_carry_a_licence():
    crops = list(photo_crops(64, 2, seed=3))
    assert len(crops) == 2 * len(PHOTOGRAPHS) and len({crop.name for crop in crops}) == len(PHOTOGRAPHS)
    assert all(crop.image.size == (64, 64) and crop.image.mode == "RGB" and crop.licence for crop in crops)
    assert crops[0].image.tobytes() == next(iter(photo_crops(64, 2, seed=3))).image.tobytes()


@pytest.mark.parametrize("name", MEASURES)
def test_the_target_itself_scores_best(name):
    scene = _worded()
    target, mask = to_tensor(scene.image), to_mask(scene.words_mask)
    perfect = measure(name, target, target, mask, scene.truth, PROMPT)
    assert perfect == pytest.approx(1.0 if name == "glyph_agreement" else 0.0, abs=1e-3)
    noisy = (target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) * mask).clamp(0, 1)
    assert measure(name, noisy, target, mask, scene.truth, PROMPT) < perfect


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "glyph_agreement"])
def test_pixels_outside_the_mask_do_not_count_much(name):
    """Only where filters reach over the mask's edge may the outside be felt: far away nothing counts."""
    scene = render_scene(1)
    target, mask = to_tensor(scene.image), torch.zeros(1, 64, 64)
    mask[:, 40:60, 40:60] = 1
    other = target.clone()
    other[:, :20] = 0
    assert measure(name, other, target, mask, scene.truth, PROMPT) == pytest.approx(0.0, abs=1e-6)


def test_measures_by_hand():
    target, mask = torch.zeros(3, 8, 8), torch.ones(1, 8, 8)
    image = torch.full((3, 8, 8), 0.5)
    assert measure("clean_agreement", image, target, mask, {}, PROMPT) == pytest.approx(-0.25)
    assert measure("prompt_agreement", image, target, mask, {}, PROMPT) == pytest.approx(-0.5)
    assert measure("edge_agreement", image, target, mask, {}, PROMPT) == pytest.approx(0.0)  # no edge in either
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * torch.ones(3, 1, 1)
    assert measure("prompt_agreement", checks, torch.full((3, 8, 8), 0.5), mask, {}, PROMPT) == pytest.approx(-0.5)  # 1 px cells at 8 px


def test_lettering_counts_in_either_polarity_but_not_another_word():
    first = _worded()
    second = next(s for s in map(render_scene, range(400)) if s.words and s.words != first.words)
    x0, y0, x1, y1 = first.truth["word"]["box"]
    u0, v0, u1, v1 = second.truth["word"]["box"]
    target, mask = to_tensor(first.image), to_mask(first.words_mask)
    inverted, swapped = target.clone(), target.clone()
    inverted[:, y0:y1, x0:x1] = 1 - inverted[:, y0:y1, x0:x1]
    swapped[:, y0:y1, x0:x1] = to_tensor(second.image)[:, v0:v1, u0:u1]
    read = [measure("glyph_agreement", picture, target, mask, first.truth, PROMPT) for picture in (target, inverted, swapped)]
    assert read[1] == pytest.approx(read[0], abs=1e-3) and read[2] < 0.8


def test_a_word_that_is_asked_for_is_read_letter_by_letter():
    scene = _worded()
    x0, y0, x1, y1 = scene.truth["word"]["box"]
    target, mask, asked = to_tensor(scene.image), to_mask(scene.words_mask), f'the word "{scene.words}"'
    half, blank = target.clone(), target.clone()
    half[:, y0:y1, (x0 + x1) // 2 : x1] = target[:, y0, x0][:, None, None]  # the letters on the right are gone
    blank[:, y0:y1, x0:x1] = target[:, y0, x0][:, None, None]
    read = [measure("prompt_agreement", picture, target, mask, scene.truth, asked) for picture in (target, half, blank)]
    assert read[0] == pytest.approx(1.0, abs=1e-4) and 0.2 < read[1] < 0.8 and read[2] < 0.1


def test_an_object_that_is_asked_for_is_to_show_its_colour_on_its_shape_wherever_nearby():
    scene = render_scene(2)
    thing, target, clean = scene.truth["object"], to_tensor(scene.image), to_tensor(scene.clean)
    x0, y0, x1, y1 = thing["box"]
    mask, hardly, asked = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64), scene.caption
    mask[:, max(0, y0 - 6) : y1 + 6, max(0, x0 - 6) : x1 + 6] = 1
    hardly[:, y0 : y0 + 4, x0:x1] = 1  # a rim of it

    def read(picture: torch.Tensor, mask: torch.Tensor = mask) -> float:
        return measure("prompt_agreement", picture, target, mask, scene.truth, asked)

    def instead(**other: str) -> torch.Tensor:
        return to_tensor(render_scene(2, instead=other).image)

    others = {"colour": COLOURS, "shape": SHAPES}
    rivals = {what: [read(instead(**{what: name})) for name in names if name != thing[what]] for what, names in others.items()}
    perfect = read(target)
    assert perfect > 0.7 and read(target.roll((3, -3), (1, 2))) == pytest.approx(perfect, abs=0.1)  # its place may be another
    assert max(rivals["colour"]) < 0.5 and max(rivals["shape"]) < perfect - 0.05
    assert 0.2 < read((target + clean) / 2) < 0.6 * perfect and read(clean) == pytest.approx(0, abs=0.05)  # faded, and gone
    for other in (hardly, torch.ones(1, 64, 64)):  # where the request is about less or more than the object, pictures are compared
        assert read(target, other) == 0 > read(clean, other)


def test_every_dimension_has_a_measure_and_unknown_ones_are_named():
    dimensions = Taxonomy.load().dimensions
    assert {dimension.labelled_by for dimension in dimensions} <= set(MEASURES)
    assert {dimension.accepted_by for dimension in dimensions} <= set(ACCEPTANCE)
    with pytest.raises(ConfigError, match="beauty"):
        measure("beauty", torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(1, 8, 8), {}, PROMPT)
