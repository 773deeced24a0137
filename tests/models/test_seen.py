"""What is to be seen in an edit: each fact follows what is in the picture, and nothing else."""

from itertools import count, islice

import pytest
import torch
from PIL import Image
from torch import Tensor

from models.images import to_tensor
from models.mini.scenes import COLOURS, SHAPES, Scene, render_scene, silhouette
from models.mini.seen import FACTS, seen

EVERYWHERE = torch.ones(1, 64, 64)
ALL = {"object": True, "colour": True, "shape": True}


def scenes(number: int, worded: bool = False) -> list[Scene]:
    found = (render_scene(seed) for seed in count())
    return list(islice((scene for scene in found if not worded or scene.words), number))


def drawn(scene: Scene, shape: str, colour: str, strength: float = 1.0) -> Tensor:
    """The clean scene with another object at the object's place."""
    cover = torch.from_numpy(silhouette(shape, tuple(scene.truth["object"]["box"]), 64)) * strength
    paint = torch.tensor(COLOURS[colour]).view(3, 1, 1) / 255
    return to_tensor(scene.clean) * (1 - cover) + paint * cover


def facts(scene: Scene, image: Tensor, mask: Tensor = EVERYWHERE) -> dict[str, bool]:
    return seen(image, mask, scene.truth, scene.caption, "object")


@pytest.mark.parametrize("scene", scenes(12), ids=lambda scene: scene.caption)
def test_a_perfect_edit_shows_what_was_asked_for(scene: Scene) -> None:
    assert facts(scene, to_tensor(scene.image)) == ALL
    assert seen(to_tensor(scene.image), EVERYWHERE, scene.truth, "remove", "clean") == {"gone": False}


def test_a_wrong_shape_or_colour_is_told_apart() -> None:
    for scene in scenes(8):
        shape, colour = scene.truth["object"]["shape"], scene.truth["object"]["colour"]
        other_shape = next(name for name in SHAPES if name not in (shape, "circle", "ring"))
        other_colour = "red" if colour != "red" else "blue"
        assert facts(scene, drawn(scene, shape, other_colour)) == ALL | {"colour": False}
        wrong = facts(scene, drawn(scene, other_shape, colour))
        assert not wrong["shape"]


def test_where_nothing_is_nothing_is_seen_but_for_a_rare_texture() -> None:
    imagined = [facts(scene, to_tensor(scene.clean))["object"] for scene in scenes(200)]
    assert sum(imagined) <= 0.03 * len(imagined)
    gone = [seen(to_tensor(scene.clean), EVERYWHERE, scene.truth, "remove", "clean")["gone"] for scene in scenes(200)]
    assert gone == [not there for there in imagined]


def test_a_hole_of_a_wrong_colour_is_gone_and_a_ghost_is_not() -> None:
    scene = next(scene for scene in scenes(60) if scene.truth["background"]["texture"] == "plain")
    x0, y0, x1, y1 = scene.truth["object"]["box"]
    hole = torch.zeros(1, 64, 64)
    hole[:, y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = 1
    wrong = torch.where(hole > 0, torch.tensor([0.1, 0.9, 0.1]).view(3, 1, 1), to_tensor(scene.clean))
    assert seen(wrong, hole, scene.truth, "remove", "clean") == {"gone": True}
    ghost = drawn(scene, scene.truth["object"]["shape"], scene.truth["object"]["colour"], strength=0.3)
    assert seen(ghost, hole, scene.truth, "remove", "clean") == {"gone": False}


def test_the_word_is_the_asked_one_or_it_is_not() -> None:
    for scene in scenes(5, worded=True):
        asked, image = f'the word "{scene.words}"', to_tensor(scene.image)
        assert seen(image, EVERYWHERE, scene.truth, asked, "word") == {"word": True}
        other = render_scene(next(s.seed for s in scenes(20, worded=True) if s.words != scene.words))
        sign = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
        sign.paste(other.image.crop(other.truth["word"]["box"]), scene.truth["word"]["box"][:2])
        assert seen(to_tensor(sign), EVERYWHERE, scene.truth, asked, "word") == {"word": False}


def test_what_is_not_asked_for_is_not_told() -> None:
    scene = scenes(1)[0]
    image = to_tensor(scene.image)
    assert seen(image, EVERYWHERE, scene.truth, "high-definition", "scene") == {}
    x0, y0, x1, y1 = scene.truth["object"]["box"]
    corner = torch.zeros(1, 64, 64)
    corner[:, y0 : y0 + (y1 - y0) // 3, x0:x1] = 1  # a third of its box
    assert facts(scene, image, corner) == {}
    assert seen(image, corner, scene.truth, "remove", "clean") == {}
    assert set(FACTS) == {*ALL, "word", "gone"}
