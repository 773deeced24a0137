"""The diverse subset (the paper: CLIP embeddings, then K-means), and two pictures that show what was chosen and what was left out.

    choice = choose(points, count=600, clusters=32, seed=0)
    save_picture(out, "choice", choice_plot(choice))

Clusters take turns, each giving its member nearest to the centre first: a crowded corner of the pool gives no more than a
sparse one until the sparse one is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from ops.pictures import QUIET, grid, plot

SHOWN_CLUSTERS, SHOWN_CHOSEN, SHOWN_LEFT_OUT = 8, 7, 4


@dataclass(frozen=True)
class Choice:
    """N pictures of which some are kept."""

    points: np.ndarray  # [N, D] embeddings
    clusters: np.ndarray  # [N] index of the cluster
    turn: np.ndarray  # [N] place in the own cluster, 0 nearest to its centre
    kept: np.ndarray  # [N] bool


def choose(points: np.ndarray, *, count: int, clusters: int, seed: int) -> Choice:
    """Keep `count` of the points [N, D]; all of them where there are no more."""
    total = len(points)
    means = KMeans(n_clusters=min(clusters, total), n_init=2, random_state=seed).fit(points)
    distance = means.transform(points)[np.arange(total), means.labels_]  # [N] to the own centre
    turn = np.zeros(total, int)
    for cluster in range(means.n_clusters):
        members = np.flatnonzero(means.labels_ == cluster)
        turn[members[np.argsort(distance[members], kind="stable")]] = np.arange(len(members))
    kept = np.zeros(total, bool)
    kept[np.lexsort((distance, turn))[:count]] = True
    return Choice(points, means.labels_, turn, kept)


def choice_plot(choice: Choice) -> Figure:
    """Every picture at its two principal components, coloured by cluster: dots are kept, crosses left out."""
    flat = PCA(n_components=2, random_state=0).fit_transform(choice.points)  # [N, 2]
    colours = matplotlib.colormaps["hsv"](choice.clusters / (choice.clusters.max() + 1))  # [N, 4]
    figure, axes = plot(5.4, 4.2, f"{choice.kept.sum()} of {len(flat)} pictures kept, {choice.clusters.max() + 1} clusters")
    for name, chosen, marker, size in (("kept", choice.kept, "o", 14), ("left out", ~choice.kept, "x", 18)):
        axes.scatter(flat[chosen, 0], flat[chosen, 1], s=size, c=colours[chosen], marker=marker, linewidths=0.9)
        axes.scatter([], [], s=size, c=QUIET, marker=marker, linewidths=0.9, label=name)
    axes.set_xlabel("first principal component of the embeddings")
    axes.set_ylabel("second")
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9, labelcolor=QUIET)
    return figure


def choice_grid(choice: Choice, picture: Callable[[int], Image.Image]) -> Image.Image:
    """One row per cluster, the largest first: the kept pictures nearest to its centre, and the nearest of those left out.

    `picture` gives the picture of an index.
    """
    sizes = np.bincount(choice.clusters)
    rows: list[list[Image.Image | None]] = []
    captions = []
    for cluster in np.argsort(-sizes, kind="stable")[:SHOWN_CLUSTERS]:
        members = np.flatnonzero(choice.clusters == cluster)
        members = members[np.argsort(choice.turn[members])]
        kept = choice.kept[members]
        row: list[Image.Image | None] = []
        for shown, width in ((members[kept], SHOWN_CHOSEN), (members[~kept], SHOWN_LEFT_OUT)):
            row += [picture(index) for index in shown[:width]] + [None] * (width - len(shown[:width]))
        rows.append(row)
        captions.append(f"cluster {cluster}: {kept.sum()} of {len(members)} kept")
    columns = ["kept", *[""] * (SHOWN_CHOSEN - 1), "left out", *[""] * (SHOWN_LEFT_OUT - 1)]
    return grid(rows, columns=columns, captions=captions, cell=56)
