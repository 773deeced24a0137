"""Masks of every kind, and the requests made with them."""

import time

import numpy as np
import pytest
from PIL import Image

from models.conditions import Made, make_condition
from models.errors import BadMask
from models.masks import check_mask, dilate, make_mask
from models.mini.scenes import render_scene
from models.taxonomy import Taxonomy

SIZE = (64, 48)


@pytest.fixture
def disc() -> Image.Image:
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (20, 15, 36, 30))
    return mask


def white(mask: Image.Image) -> np.ndarray:
    values = np.asarray(mask)
    assert set(np.unique(values)) <= {0, 255}
    return values == 255


@pytest.mark.parametrize("seed", range(20))
def test_each_kind_has_its_shape(disc, seed):
    rng = np.random.default_rng(seed)
    inside = white(disc)
    box = white(make_mask("box", SIZE, region=disc, rng=rng))
    assert box[inside].all() and box.sum() > inside.sum()
    rows, columns = np.where(box.any(1))[0], np.where(box.any(0))[0]
    assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
    assert not box[:, : 20 - 8].any() and not box[:, 36 + 8 :].any()  # padded by 8 px at most
    grown = white(make_mask("object", SIZE, region=disc, rng=rng))
    assert grown[inside].all() and inside.sum() < grown.sum() <= (16 + 8) * (15 + 8)
    assert (white(make_mask("background", SIZE, region=disc, rng=rng)) == ~inside).all()
    kept = ~white(make_mask("border", SIZE, region=None, rng=rng))
    assert 0.5 - 0.03 <= kept.any(0).mean() <= 0.75 + 0.03 and 0.5 - 0.03 <= kept.any(1).mean() <= 0.75 + 0.03
    brush = white(make_mask("brush", SIZE, region=disc, rng=rng))
    assert brush[inside].all() and inside.sum() < brush.sum() and not (brush & ~dilated_box(disc, 9)).any()
    rows, columns = np.where(brush.any(1))[0], np.where(brush.any(0))[0]
    assert not brush[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # no rectangle
    assert white(make_mask("brush", SIZE, region=None, rng=rng)).any() and white(make_mask("box", SIZE, region=None, rng=rng)).any()


def dilated_box(mask: Image.Image, by: int) -> np.ndarray:
    return white(dilate(mask, by))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_goes_around_an_object_covers_all_of_it(seed):
    """The object is what the prompt asks for: left in the picture it would answer the request by itself."""
    scene, rng = render_scene(seed), np.random.default_rng(seed)
    inside = white(scene.object_mask)
    for kind in ("box", "brush", "object"):
        assert white(make_mask(kind, scene.image.size, region=scene.object_mask, rng=rng))[inside].all()


def test_a_brush_covers_parts_that_lie_apart_and_single_pixels():
    parts = Image.new("L", SIZE, 0)
    parts.paste(255, (4, 4, 12, 9))
    parts.paste(255, (40, 35, 41, 36))
    for seed in range(20):
        brush = white(make_mask("brush", SIZE, region=parts, rng=np.random.default_rng(seed)))
        assert brush[white(parts)].all() and not brush.all()


def test_equal_generators_draw_equal_masks(disc):
    first, second = (make_mask("brush", SIZE, region=disc, rng=np.random.default_rng(3)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != make_mask("brush", SIZE, region=disc, rng=np.random.default_rng(4)).tobytes()


def test_object_and_background_need_a_region():
    rng = np.random.default_rng(0)
    assert make_mask("object", SIZE, region=None, rng=rng) is None
    assert make_mask("background", SIZE, region=Image.new("L", SIZE, 0), rng=rng) is None
    assert make_mask("object", SIZE, region=Image.new("L", SIZE, 255), rng=rng) is None  # it would be full


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (10, 10), 255), "10x10"),
        (Image.new("L", SIZE, 127), "empty"),
        (Image.new("L", SIZE, 255), "full"),
    ],
)
def test_unusable_masks_are_named(mask, said):
    with pytest.raises(BadMask, match=said):
        check_mask(mask, SIZE, "cat.png")


def test_a_grey_mask_becomes_black_and_white(disc):
    soft = disc.point(lambda value: 200 if value else 30)
    assert check_mask(soft, SIZE, "cat.png").tobytes() == disc.tobytes()


def test_conditions_follow_the_taxonomy(disc):
    taxonomy, rng = Taxonomy.load(), np.random.default_rng(0)
    image, clean = Image.new("RGB", SIZE, "red"), Image.new("RGB", SIZE, "blue")
    facts = {"clean": clean, "object_mask": disc, "words_mask": disc, "caption": "a red disc", "words": "CAT", "truth": {}, "rng": rng}
    prompts = {task.name: make_condition(task, image, **facts).prompt for task in taxonomy.tasks}
    assert prompts["fill"] == "a red disc" and prompts["text"] == 'the word "CAT"' and prompts["remove"] == "remove"
    assert prompts["extend_free"] == "high-definition, perfect composition"
    assert make_condition(taxonomy.task("remove"), image, **facts).target is clean
    assert make_condition(taxonomy.task("fill"), image, **facts).target is image
    assert make_condition(taxonomy.task("remove"), image, **{**facts, "clean": None}).target is None


def test_a_picture_that_cannot_serve_a_task_makes_none():
    taxonomy, rng, image = Taxonomy.load(), np.random.default_rng(0), Image.new("RGB", SIZE, "red")
    assert make_condition(taxonomy.task("text"), image, caption="a sign", rng=rng) is None
    assert make_condition(taxonomy.task("remove"), image, caption="a sign", rng=rng) is None
    assert make_condition(taxonomy.task("fill"), image, rng=rng) is None  # no caption
    assert make_condition(taxonomy.task("fill"), image, caption="a sign", rng=rng) is not None


def test_one_of_several_kinds_is_drawn_per_request_and_named(disc):
    task, image = Taxonomy.load().task("fill"), Image.new("RGB", SIZE, "red")
    assert set(task.mask) == {"box", "brush"}

    def request(seed: int) -> Made:
        made = make_condition(task, image, object_mask=disc, caption="a disc", rng=np.random.default_rng(seed))
        assert made is not None
        return made

    made = [request(seed) for seed in range(60)]
    drawn = [request.mask_kind for request in made]
    assert 20 <= drawn.count("box") <= 40 and drawn.count("brush") == 60 - drawn.count("box")
    assert drawn == [request(seed).mask_kind for seed in range(60)]
    for request_ in made:
        mask = white(request_.mask)
        assert request_.target is image and mask[white(disc)].all()
        rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() == (request_.mask_kind == "box")


def test_the_users_own_mask_is_taken_as_it_is(disc):
    task = Taxonomy.load().task("extend")
    made = make_condition(task, Image.new("RGB", SIZE), caption="a sea", mask=disc, rng=np.random.default_rng(0))
    assert made.mask is disc and made.mask_kind == "given" and made.target is None


def test_a_condition_costs_under_a_millisecond(disc):
    taxonomy, rng, image = Taxonomy.load(), np.random.default_rng(0), Image.new("RGB", SIZE)
    start = time.process_time()
    for _ in range(40):
        for task in taxonomy.tasks:
            make_condition(task, image, object_mask=disc, words_mask=disc, caption="a", words="A", rng=rng)
    assert (time.process_time() - start) / (40 * len(taxonomy.tasks)) < 1e-3
