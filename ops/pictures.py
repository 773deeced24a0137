"""Pictures that artifacts carry: grids of images, curves, rates with intervals, tables.

    save_picture(out, "grid-fill", grid([[overlay(image, mask), base, tuned]], columns=["asked", "base", "tuned"]))
    save_picture(out, "curve", curves({"reward": (steps, rewards)}, x="step", y="mean P(yes)"))

Grids are PIL images; plots are matplotlib `Figure`s built without pyplot, whose global state would outlive a stage of a
long-running process. `svg` renders a plot for a page, its colours as CSS variables so that it follows light and dark.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

# Ink, quiet ink, hairlines, and the series in fixed order: distinguishable to colour-blind readers, also as greys.
INK, QUIET, LINE = "#22262b", "#6b7280", "#d9dde3"
SERIES = ("#2a6fdb", "#e0692c", "#2f9e77", "#8a5cd1", "#a98600")  # as many as the taxonomy has tasks
MASK_TINT = (224, 64, 96)
_GAP = 6
_LINE_HEIGHT = 17


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the pixels to be made (mask 128 and more) tinted and outlined."""
    inside = np.asarray(mask.convert("L").resize(image.size, Image.Resampling.NEAREST)) >= 128  # [H, W]
    padded = np.pad(inside, 1)
    neighbours = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    tint = np.asarray(MASK_TINT, dtype=np.float32)
    pixels[inside] = 0.45 * pixels[inside] + 0.55 * tint
    pixels[inside & ~neighbours] = tint
    return Image.fromarray(pixels.round().astype(np.uint8))


def grid(
    rows: Sequence[Sequence[Image.Image | None]], *, columns: Sequence[str], captions: Sequence[str] | None = None, cell: int = 128
) -> Image.Image:
    """Images side by side, `cell` pixels on their longer side, with a heading per column (no line of them where all are empty)
    and a caption above each row.

    None leaves a cell empty. Raises ValueError when a row's length differs from the number of columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} images under {len(columns)} columns")
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    width = len(columns) * (cell + _GAP) + _GAP
    wrapped = [textwrap.wrap(text, max(12, width // 7)) for text in captions] if captions else [[] for _ in rows]
    heading = _LINE_HEIGHT if any(columns) else 0
    height = _GAP + heading + sum(len(lines) * _LINE_HEIGHT + cell + _GAP for lines in wrapped)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(columns):
        draw.text((_GAP + index * (cell + _GAP), _GAP // 2), name, fill=INK, font=font)
    top = _GAP + heading
    for row, lines in zip(rows, wrapped, strict=True):
        for line in lines:
            draw.text((_GAP, top), line, fill=QUIET, font=small)
            top += _LINE_HEIGHT
        for index, image in enumerate(row):
            if image is not None:
                sheet.paste(_fit(image, cell), (_GAP + index * (cell + _GAP), top))
        top += cell + _GAP
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    reference: float | None = None,
    smooth: int = 1,
) -> Figure:
    """One line per series of (x, y) values. `smooth` > 1 draws the running mean over that many points on top of the faint raw line."""
    figure, axes = plot(4.8, 2.9, title)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        colour = SERIES[index % len(SERIES)]
        values = np.asarray(ys, dtype=float)
        window = min(smooth, len(values))
        if window > 1:
            axes.plot(xs, values, color=colour, linewidth=0.8, alpha=0.25)
            kernel = np.ones(window)
            values = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
        axes.plot(xs, values, color=colour, linewidth=1.8, label=name, marker="o" if len(values) == 1 else None)
    if reference is not None:
        axes.axhline(reference, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(figure, axes, len(series))
    return figure


def rates(
    labels: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    x: str,
    title: str = "",
    reference: float | None = 0.5,
    limits: tuple[float, float] = (0, 1),
) -> Figure:
    """Rates with their intervals, one line per label and one dot per series. Entries are (rate, lo, hi); None where there is no figure."""
    figure, axes = plot(4.8, 0.9 + 0.2 * len(labels) * (1 + 0.6 * len(series)), title)
    if reference is not None:
        axes.axvline(reference, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    for index, (name, entries) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * 0.28
        known = [(row + offset, *entry) for row, entry in enumerate(entries) if entry is not None]
        if known:
            at, rate, lo, hi = map(np.asarray, zip(*known, strict=True))
            spread = np.stack([rate - lo, hi - rate]).clip(min=0)
            colour = SERIES[index % len(SERIES)]
            axes.errorbar(rate, at, xerr=spread, fmt="o", color=colour, markersize=5, elinewidth=2, capsize=0, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(*limits)
    axes.set_xlabel(x)
    axes.grid(axis="y", visible=False)
    _legend(figure, axes, len(series))
    return figure


def against_steps(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    *,
    x: str,
    y: str,
    reference: float = 0.5,
    columns: int = 3,
) -> Figure:
    """Small multiples that share both axes: per panel one line with its interval as a band per series of (x, value, lo, hi).

    A series keeps its colour from panel to panel. Panels without points are left out.
    """
    shown = {title: series for title, series in panels.items() if any(series.values())}
    names = list(dict.fromkeys(name for series in shown.values() for name in series))
    columns = min(columns, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(0.6 + 2.3 * columns, 0.6 + 1.9 * lines), layout="constrained")
    for place, (title, series) in enumerate(shown.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        _dress(axes, title)
        axes.axhline(reference, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        for name, points in series.items():
            if points:
                at, value, low, high = map(np.asarray, zip(*points, strict=True))
                colour = SERIES[names.index(name) % len(SERIES)]
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(at, value, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
        axes.set_ylim(0, 1)
        if place % columns == 0:
            axes.set_ylabel(y)
        if place >= len(shown) - columns:
            axes.set_xlabel(x)
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper right",
            ncols=min(len(handles), 3),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    return figure


def stacked_bars(labels: Sequence[str], parts: Mapping[str, tuple[Sequence[float], str]], *, x: str) -> Figure:
    """One horizontal bar per label, made of parts in order; each part has its lengths and its colour."""
    figure, axes = plot(5.2, 0.8 + 0.24 * len(labels))
    ends = [0.0] * len(labels)
    for name, (lengths, colour) in parts.items():
        axes.barh(range(len(labels)), lengths, left=ends, color=colour, label=name, height=0.7)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.grid(axis="y", visible=False)
    _legend(figure, axes, len(parts))
    return figure


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Figure:
    """A table as a figure: first column flush left, the others flush right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) + 2 for i in range(len(columns))]
    figure = Figure(figsize=(max(3.0, 0.082 * sum(widths)), 0.26 * (len(rows) + 1) + (0.35 if title else 0.1)), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    drawn = axes.table(
        cellText=[list(map(str, row)) for row in rows],
        colLabels=list(columns),
        colWidths=[width / sum(widths) for width in widths],
        bbox=Bbox.unit(),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), box in drawn.get_celld().items():
        box.set_edgecolor(LINE)
        box.visible_edges = "B"
        text = box.get_text()
        text.set_horizontalalignment("left" if column == 0 else "right")
        text.set_color(QUIET if row == 0 else INK)
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left")
    return figure


def svg(figure: Figure) -> str:
    """The plot as inline SVG text: real text, no background, colours as CSS variables --ink, --quiet, --line, --series-1 ..."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onereward"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in {"ink": INK, "quiet": QUIET, "line": LINE, **{f"series-{i + 1}": c for i, c in enumerate(SERIES)}}.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def plot(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """An empty plot of that size in inches, in the house's style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, title)
    return figure, axes


def _dress(axes: Axes, title: str) -> None:
    """The house's style: hairlines, quiet labels, no frame."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=9, length=0)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left")


def _legend(figure: Figure, axes: Axes, series: int) -> None:
    if series > 1 and axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", ncols=min(series, 3), frameon=False, fontsize=9, labelcolor=INK)
