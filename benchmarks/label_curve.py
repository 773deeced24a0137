"""How many labels to buy: accuracy of the judge against the number of training labels, for annotators who err more or less.

    python -m benchmarks.label_curve --home .bench/bench-0 --home .bench/bench-1 --home .bench/bench-2   # a home a seed
    python -m benchmarks.label_curve --seeds 0                                       # without homes: makes its own candidates first
    python -m benchmarks.label_curve --seeds 1 2 --sizes 250 4000 --errors 0 0.25

The candidates of a seed are labelled again by the scripted annotator at every error rate. A judge is fitted from the base judge on so
many of the decided training labels, drawn at random, with a quarter as many validation labels by the same annotator to stop by, and
asked about sealed test pairs that were labelled without error. Each fit is written to `benchmarks/results/label_curve.json` as it ends,
and is not made again for the same data and commit; several processes may add to it. The plot goes into docs/results.md.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_page import LABELS, ROOT, write_page
from benchmarks.rows import keep, machine, rows
from benchmarks.run import PRESET, SEEDS
from infra.data import ensure_data, weights
from infra.progress import Progress
from infra.stores.base import directory_digest
from infra.workspace import Workspace
from models.errors import UnknownVersion
from models.judge import Judge
from models.records import Pair, read_rows
from models.taxonomy import Taxonomy
from ops.curate import CurateConfig, curate
from ops.embed import vae_embedder
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.generate import GenerateConfig, generate
from ops.judge_accuracy import judge_accuracy
from ops.label import LabelConfig, label_scripted
from ops.pair import PairConfig, make_pairs
from ops.source import SourceConfig, source_images
from pipelines.config import load_settings
from pipelines.report import commit

# All ours. Four sizes at even distances in their logarithm and three error rates: twelve fits a seed.
SIZES = (250, 630, 1600, 4000)
ERRORS = (0.0, 0.1, 0.25)
TEST_PAIRS = 1700  # a hundred a cell
VALIDATION_SHARE = 0.25  # of the training labels, bought on top
STEPS_POWER = 0.25  # steps grow with labels to this power: 16 times the labels are trained on twice as long


def stored(home: Path) -> tuple[Path, Path]:
    """The curated dataset and candidates of a home's newest round that sampled the base. Raises UnknownVersion where there is none."""
    store = Workspace(home.resolve()).store
    of_base = [version for version in store.versions("candidates") if version.config.get("policy", "base") == "base"]
    if not of_base:
        raise UnknownVersion(f"{home} holds no candidates of the base.", "Run the chain there first, or leave out --home.")
    curated = next(parent for parent in of_base[-1].parents if parent.name == "curated_dataset")
    return store.get(curated), store.get(of_base[-1].ref)


def made(settings: Any, seed: int, folder: Path, progress: Progress) -> tuple[Path, Path]:
    """A curated dataset and candidates, made into `folder` as the preset's chain makes them."""
    sections = {name: {**settings.stages.get(name, {}), "seed": seed} for name in ("source_images", "curated_dataset", "candidates")}
    base, taxonomy = weights(settings.flux, ROOT), Taxonomy.load()
    sources, curated, candidates = (folder / name for name in sections)
    for out in (sources, curated, candidates):
        out.mkdir()
    source_images(SourceConfig(**sections["source_images"]), sources, progress, taxonomy)
    curate(CurateConfig(**sections["curated_dataset"]), sources, curated, progress, vae_embedder(base), taxonomy)
    config = GenerateConfig(**sections["candidates"])
    generate(config, {directory_digest(base)[0]: base}, curated, candidates, progress, taxonomy)
    return curated, candidates


def labelled(settings: Any, seed: int, error: float, data: tuple[Path, Path], folder: Path, progress: Progress) -> Path:
    """The pairs of an annotator with that error rate, as an artifact folder."""
    taxonomy, preferences, pairs = Taxonomy.load(), folder / f"labels-{error:g}", folder / f"pairs-{error:g}"
    preferences.mkdir()
    pairs.mkdir()
    config = LabelConfig(**{**settings.stages.get("preferences", {}), "error_rate": error, "seed": seed})
    label_scripted(config, *data, [], taxonomy, preferences, progress)
    make_pairs(PairConfig(**settings.stages.get("preference_pairs", {})), *data, preferences, pairs, progress, taxonomy)
    return pairs


def fit_config(section: dict[str, Any], seed: int, labels: int, most: int) -> FitRewardConfig:
    """The preset's judge without the second one, fitted to `labels` labels: fewer steps the fewer they are of `most`."""
    whole = FitRewardConfig(**{**section, "second_share": 0.0, "seed": seed})
    share = (labels / most) ** STEPS_POWER
    fewer = {name: max(1, round(getattr(whole, name) * share)) for name in ("steps", "eval_every", "warmup_steps")}
    return whole.model_copy(update={**fewer, "max_pairs": labels, "max_validation_pairs": max(1, round(labels * VALIDATION_SHARE))})


def accuracy(judge: Path, sealed: Sequence[Pair], data: tuple[Path, Path], config: FitRewardConfig, progress: Progress) -> dict[str, Any]:
    """What `judge_accuracy` says of a judge fitted so, without its rows."""
    taxonomy = Taxonomy.load()
    asking: dict[str, Any] = {"batch_size": config.batch_size, "paste_source": config.paste_source, "progress": progress}
    found = judge_accuracy(Judge.load(judge, taxonomy), taxonomy, sealed, *data, **asking)
    return {name: found[name] for name in ("mean_accuracy", "lo", "hi", "order_consistency", "n", "cells")}


def curve(
    settings: Any,
    seed: int,
    data: tuple[Path, Path],
    out: Path,
    *,
    sizes: Sequence[int],
    errors: Sequence[float],
    test_pairs: int,
    folder: Path,
    progress: Progress,
) -> None:
    """One seed's fits, each kept in `out` as it ends; those that are there already are not made again."""
    about = {"data": directory_digest(data[1])[0], "commit": commit(), "test_pairs": test_pairs}
    truth = read_rows(labelled(settings, seed, 0.0, data, folder, progress) / "pairs.jsonl", Pair)
    sealed = [pair for pair in truth if pair.split == "test"]
    sealed = random.Random(seed).sample(sealed, min(test_pairs, len(sealed)))
    most = sum(pair.split == "train" for pair in truth)
    for error in errors:
        pairs = folder / "pairs-0" if error == 0 else labelled(settings, seed, error, data, folder, progress)
        for labels in sorted({min(size, most) for size in sizes}):
            key = {"seed": seed, "error_rate": error, "labels": labels}
            if any({**key, **about}.items() <= row.items() for row in rows(out)) and not about["commit"].endswith("+"):
                progress.say(f"{key} is there already")
                continue
            config = fit_config(settings.stages.get("reward_model", {}), seed, labels, most)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as place:
                metrics = fit_reward(config, weights(settings.judge, ROOT), *data, pairs, Path(place), progress)
                found = accuracy(Path(place), sealed, data, config, progress)
            fitted = {"steps": metrics["steps"], "best_step": metrics["best_step"], "validation_labels": metrics["pairs_validation"]}
            where = {"machine": machine(), "threads": torch.get_num_threads(), "wall_s": round(time.monotonic() - start, 1)}
            keep(out, {**key, **about, **where, **fitted, **found}, *key)
            progress.say(f"{key}: accuracy {found['mean_accuracy']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--home", type=Path, action="append", default=[], help="home of a seed's run, in the order of --seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of labels; more than there are means all")
    parser.add_argument("--errors", type=float, nargs="+", default=ERRORS)
    parser.add_argument("--test-pairs", type=int, default=TEST_PAIRS, help="sealed pairs at most, drawn at random")
    parser.add_argument("--out", type=Path, default=LABELS)
    arguments = parser.parse_args()
    if arguments.home and len(arguments.home) != len(arguments.seeds):
        parser.error(f"{len(arguments.home)} homes for {len(arguments.seeds)} seeds: name one home a seed, or none")
    settings, progress = load_settings(arguments.preset), Progress(print)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", settings.threads)))
    ensure_data(ROOT)
    for place, seed in enumerate(arguments.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = stored(arguments.home[place]) if arguments.home else made(settings, seed, folder, progress)
            curve(
                settings,
                seed,
                data,
                arguments.out,
                sizes=arguments.sizes,
                errors=arguments.errors,
                test_pairs=arguments.test_pairs,
                folder=folder,
                progress=progress,
            )
    if arguments.out == LABELS:
        print(write_page())


if __name__ == "__main__":
    main()
