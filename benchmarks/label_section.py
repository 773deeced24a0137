"""The section of docs/results.md that says how many labels to buy, from the stored fits of `python -m benchmarks.label_curve`."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.markdown import NONE, rate, table
from ops.pictures import SERIES, plot

UNTOUCHED = "°"
ABOUT = f"""\
Accuracy on sealed test pairs labelled without error, of judges fitted from the base judge to so many labels by an annotator who swaps
best and worst as often as the error rate says. A label is a decided one: ties cost work too and are not counted. A quarter as many
validation labels by the same annotator, bought on top, choose when to stop. Read along a line what more labels bring, and across the
lines what a second look at each label would: where a line of fewer errors reaches at few labels what another reaches at many, care
is cheaper than number. Small dots and brackets are the seeds, lines their means. The base judge, from which every fit starts, has been
trained on the measures that the labels are made from (`ops/pretrain_judge.py`); a fit marked {UNTOUCHED} ended where it began, because no
step of it was better on its validation labels, and is that base judge. Made by `python -m benchmarks.label_curve`."""


def label_table(fits: list[dict[str, Any]]) -> str:
    errors = sorted({fit["error_rate"] for fit in fits})
    lines = []
    for size in sorted({fit["labels"] for fit in fits}):
        line = [str(size)]
        for error in errors:
            here = [fit for fit in fits if (fit["labels"], fit["error_rate"]) == (size, error)]
            seeds = [rate(fit["mean_accuracy"]) + ("" if fit["best_step"] else UNTOUCHED) for fit in here]
            line.append(f"{rate(sum(fit['mean_accuracy'] for fit in here) / len(here))} ({', '.join(seeds)})" if here else NONE)
        lines.append(line)
    return table(["labels", *(f"error rate {error:g}" for error in errors)], lines)


def commits_of(fits: list[dict[str, Any]]) -> str:
    """Fits of several commits may lie in one file: one that was not made again is not taken away."""
    return "Commits: " + ", ".join(f"`{commit[:13]}`" for commit in sorted({fit["commit"] for fit in fits})) + "."


def label_plot(fits: list[dict[str, Any]]) -> Figure:
    """Accuracy against number of labels: a line through the means and a dot per seed for each error rate."""
    figure, axes = plot(5.2, 3.2)
    for colour, error in zip(SERIES, sorted({fit["error_rate"] for fit in fits}), strict=False):
        here = [(fit["labels"], fit["mean_accuracy"]) for fit in fits if fit["error_rate"] == error]
        sizes = sorted({size for size, _ in here})
        means = [sum(found) / len(found) for found in ([value for at, value in here if at == size] for size in sizes)]
        axes.plot(sizes, means, color=colour, linewidth=1.8, label=f"error rate {error:g}")
        axes.scatter(*zip(*here, strict=True), color=colour, s=14, alpha=0.6, linewidths=0)
    at = sorted({fit["labels"] for fit in fits})
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{size:,}" for size in at])
    axes.minorticks_off()
    axes.set_xlabel("decided training labels")
    axes.set_ylabel("accuracy on sealed pairs")
    axes.legend(frameon=False, fontsize=9)
    return figure
