"""The diverse subset: who is kept, and that the pictures show it."""

import numpy as np
import pytest
from PIL import Image

from ops.diverse import SHOWN_CHOSEN, SHOWN_LEFT_OUT, choice_grid, choice_plot, choose


def blobs(*sizes: int) -> np.ndarray:
    """Points [N, 3] around centres that lie far apart."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(0, 0.1, (size, 3)) + 10 * index for index, size in enumerate(sizes)])


def test_clusters_take_turns_and_give_what_is_nearest_to_their_centre() -> None:
    points = blobs(40, 5, 3)
    choice = choose(points, count=15, clusters=3, seed=0)
    kept = [choice.kept[:40], choice.kept[40:45], choice.kept[45:]]
    assert [int(part.sum()) for part in kept] == [7, 5, 3]  # the sparse ones are emptied, the crowded one gives the rest
    distance = np.linalg.norm(points[:40] - points[:40].mean(0), axis=1)
    assert distance[kept[0]].max() < distance[~kept[0]].min()
    assert choose(points, count=100, clusters=64, seed=0).kept.all()  # more asked for than there are


@pytest.mark.parametrize("count", [15, 48])
def test_the_pictures_show_kept_and_left_out(count: int) -> None:
    choice = choose(blobs(40, 5, 3), count=count, clusters=3, seed=0)
    colours = {index: "red" if choice.kept[index] else "blue" for index in range(48)}
    sheet = np.asarray(choice_grid(choice, lambda index: Image.new("RGB", (8, 8), colours[index])))
    cell = 56 * 56
    red, blue = (int((sheet == colour).all(-1).sum()) / cell for colour in ((255, 0, 0), (0, 0, 255)))
    sizes = [(choice.kept[choice.clusters == c].sum(), (~choice.kept)[choice.clusters == c].sum()) for c in range(3)]
    assert red == sum(min(kept, SHOWN_CHOSEN) for kept, _ in sizes)
    assert blue == sum(min(left, SHOWN_LEFT_OUT) for _, left in sizes)
    figure = choice_plot(choice)
    drawn = [collection.get_offsets() for collection in figure.axes[0].collections]
    assert [len(offsets) for offsets in drawn if len(offsets)] == [n for n in (count, 48 - count) if n]
    assert f"{count} of 48" in figure.axes[0].get_title(loc="left")
