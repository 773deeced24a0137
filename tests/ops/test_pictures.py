"""Pictures are drawn where they should be, stay small, and leave no global plotting state behind."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ops.folders import save_picture
from ops.pictures import MASK_TINT, SERIES, curves, grid, overlay, rates, stacked_bars, svg, table


def _plain(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_overlay_marks_exactly_the_mask() -> None:
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 6, 6))
    shown = np.asarray(overlay(_plain("white", (8, 8)), mask))
    changed = (shown != 255).any(axis=-1)
    assert (changed == (np.asarray(mask) > 0)).all()
    assert tuple(shown[2, 2]) == MASK_TINT  # the outline
    assert tuple(shown[3, 3]) != MASK_TINT  # the picture shines through inside


def test_grid_places_every_image_under_its_heading() -> None:
    sheet = grid(
        [[_plain("red"), None], [_plain("lime"), _plain("blue", (64, 32))]],
        columns=["one", "two"],
        captions=["short", "a long caption " * 8],
        cell=64,
    )
    pixels = np.asarray(sheet)
    area = {
        name: int((pixels == colour).all(axis=-1).sum())
        for name, colour in [("red", (255, 0, 0)), ("lime", (0, 255, 0)), ("blue", (0, 0, 255))]
    }
    assert area == {"red": 64 * 64, "lime": 64 * 64, "blue": 64 * 32}
    red_rows = np.where((pixels == (255, 0, 0)).all(axis=-1).any(axis=1))[0]
    lime_rows = np.where((pixels == (0, 255, 0)).all(axis=-1).any(axis=1))[0]
    assert red_rows.max() < lime_rows.min()


def test_grid_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="1 images under 2 columns"):
        grid([[_plain("red")]], columns=["one", "two"])


def test_a_grid_without_headings_or_captions_has_no_room_for_them() -> None:
    rows = [[_plain("red"), _plain("lime")]] * 2
    bare = grid(rows, columns=["", ""], cell=64)
    assert grid(rows, columns=["one", ""], cell=64).height > bare.height
    assert grid(rows, columns=["", ""], captions=["first", ""], cell=64).height - bare.height < 2 * 17


def test_stacked_bars_end_where_their_parts_add_up_to() -> None:
    figure = stacked_bars(["a", "b"], {"won": ([1, 2], SERIES[0]), "lost": ([3, 0], SERIES[1])}, x="pairs")
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert ends == [1, 2, 4, 2] and [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_plots_are_small_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    def draw(name: str) -> list[bytes]:
        figures = {
            "curve": curves(
                {"static": (range(50), np.linspace(0, 1, 50)), "ema": ([0], [0.4])}, x="step", y="reward", smooth=5, reference=0.5
            ),
            "rates": rates(
                ["fill", "remove"], {"static": [(0.6, 0.5, 0.7), None], "ema": [(0.4, 0.3, 0.5), (0.5, 0.2, 0.9)]}, x="win rate"
            ),
            "table": table(["cell", "n"], [["fill", "12"], ["remove", "9"]], title="cells"),
        }
        return [save_picture(tmp_path, f"{kind}-{name}", figure).read_bytes() for kind, figure in figures.items()]

    first = draw("a")
    assert first == draw("b")
    assert all(1000 < len(picture) < 200_000 for picture in first)


def test_pyplot_is_never_loaded() -> None:
    import subprocess

    draw = "import sys, ops.pictures as p; p.svg(p.curves({'a': ([0, 1], [0, 1])}, x='x', y='y'))"
    code = f"{draw}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_svg_follows_the_page() -> None:
    figure = rates(["fill"], {"static": [(0.6, 0.5, 0.7)], "ema": [(0.4, 0.3, 0.5)]}, x="win rate")
    text = svg(figure)
    assert text.startswith("<svg") and text == svg(figure)
    for variable in ("--ink", "--quiet", "--line", "--series-1", "--series-2"):
        assert f"var({variable})" in text
    assert ">win rate</text>" in text  # real text, not outlines
