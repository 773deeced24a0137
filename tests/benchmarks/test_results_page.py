"""The page says what the stored figures say, a missed target included, and draws what there is to draw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.markdown import rate
from benchmarks.results_page import write_page
from benchmarks.rows import keep
from benchmarks.targets import MODES, targets
from models.taxonomy import Taxonomy

TAXONOMY = Taxonomy.load()


def summary(win: float) -> dict[str, Any]:
    row = {"n": 120, "win_rate": win, "lo": win - 0.05, "hi": win + 0.05}
    row |= {"confirming_win_rate": 0.9, "confirming_lo": 0.85, "confirming_hi": 0.95}
    cells = [{"task": task, "dimension": dimension, **row} for task, dimension in TAXONOMY.cells]
    judged = [
        {"task": task, "dimension": dimension, "n": 201, "accuracy": 0.81, "lo": 0.75, "hi": 0.86} for task, dimension in TAXONOMY.cells
    ]
    kept = {"preservation_psnr": 30.0, "base_preservation_psnr": 30.2, "outside_similarity": 0.95, "base_outside_similarity": 0.95}
    means = {"mean_win_rate": win, "mean_lo": win - 0.02, "mean_hi": win + 0.02}
    means |= {f"confirming_{name}": 0.9 for name in means}
    facts = [{"task": "fill", "fact": "colour", "n": 110, "more": win - 0.9, "lo": win - 0.95, "hi": win - 0.85, "p_worse": 0.5}]
    on_edits = {"mean_accuracy": 0.81, "cells": judged}
    return {
        "n": 600,
        **means,
        **kept,
        "judge_on_edits": on_edits,
        "cells": cells,
        "facts": facts,
        "tasks": [{"task": t.name, **row} for t in TAXONOMY.active],
    }


def record(seed: int, win: float) -> dict[str, Any]:
    """A seed's row in which all is well but for what `win` says."""
    cells = [
        {"task": task, "dimension": dimension, "n": 210, "accuracy": 0.85, "lo": 0.8, "hi": 0.9, "base_accuracy": 0.6}
        for task, dimension in TAXONOMY.cells
    ]
    looks = [{"step": step, "judge": 0.7, "second": 0.6, "measure_win": value} for step, value in ((6, 0.7), (12, 0.72))]
    rewarded = {task.name: [d for d in task.dimensions if d != "legibility"] for task in TAXONOMY.active}
    curve = [{"step": step, "judge": [0.5, 0.4, 0.6], "measure_win": [0.5, 0.4, 0.6]} for step in (0, 6)]
    return {
        "seed": seed,
        "command": f"python -m benchmarks.run --seeds {seed}",
        "commit": "c0ffee" * 6,
        "machine": {"processor": "x86_64", "cores": 2, "python": "3.11"},
        "threads": 1,
        "preset": {"stages": {"preferences": {"error_rate": 0}}},
        "wall_s": 1800.0,
        "peak_rss_gb": 3.0,
        "reused": [],
        "judge": {"split": "test", "n": 3570, "mean_accuracy": 0.85, "base_mean_accuracy": 0.6, "order_consistency": 0.9, "cells": cells},
        "training": {mode: {"best_step": 6, "looks": looks, "rewarded": rewarded} for mode in MODES},
        "policy": {mode: summary(win) for mode in MODES},
        "best_mode": "static",
        "absolute": {name: [{"task": t, "dimension": d, "n": 120, "mean": 0.5} for t, d in TAXONOMY.cells] for name in ("base", *MODES)},
        "seen": {
            name: [{"task": "fill", "fact": "colour", "n": 110, "share": share}]
            for name, share in zip(("base", *MODES), (0.6, 0.55, 0.5), strict=True)
        },
        "gates": [
            {
                "artifact": "evaluation",
                "name": "win_rate",
                "measure": win,
                "threshold": 0.55,
                "passed": win >= 0.55,
                "n": 600,
                "description": "mean; n 600, needed 167 for",
            }
        ],
        "release": {"version": 1, "stage": "production"},
        "refused": None,
        "curves": dict.fromkeys(MODES, curve),
        "next_round": {
            "commit": "fedcba9876543210",
            "best_mode": "ema",
            "policy": {"ema": summary(win)},
            "against_production": {"ema": summary(0.5)},
            "refused": None,
        },
    }


def refused(seed: int) -> dict[str, Any]:
    """What is left of a run that ended at the judge's gate."""
    found = dict.fromkeys(record(seed, 0.8))
    same = {
        name: value
        for name, value in record(seed, 0.8).items()
        if name in ("seed", "command", "commit", "machine", "threads", "preset", "wall_s", "peak_rss_gb")
    }
    gates = [
        {
            "artifact": "reward_model",
            "name": "judge_accuracy",
            "measure": 0.4,
            "threshold": 0.6,
            "passed": False,
            "n": 50,
            "description": "",
        }
    ]
    judge = {"split": "validation", "n": 50, "mean_accuracy": 0.4, "base_mean_accuracy": 0.4, "order_consistency": 0.9, "cells": []}
    skipped = {"skipped": "the first round was refused: judge"}
    return {
        **found,
        **same,
        "gates": gates,
        "judge": judge,
        "refused": "judge | accuracy",
        "reused": [],
        "curves": {},
        "next_round": skipped,
    }


def page(folder: Path, runs: list[dict[str, Any]], fits: list[dict[str, Any]] = []) -> str:  # noqa: B006 (never changed)
    for run in runs:
        keep(folder / "bench.json", run, "seed")
    (folder / "labels.json").write_text(json.dumps({"rows": fits}))
    return write_page(folder / "bench.json", folder / "labels.json", folder / "results.md").read_text()


def row(text: str, start: str) -> list[str]:
    return [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(f"| {start}")).split("|")[1:-1]]


def test_a_target_that_one_seed_misses_is_printed_as_missed(tmp_path: Path) -> None:
    first = record(0, 0.85)
    worst = first["next_round"]["against_production"]["ema"]["cells"][3]
    worst.update(win_rate=0.2, lo=0.12, hi=0.28)
    text = page(tmp_path, [first, record(1, 0.82), record(2, 0.74)])
    second = text[text.index("## Second round") :]
    assert row(second, "0")[1] == "fedcba9876543"  # a second round may be of a later commit than the first
    assert row(second, "0")[-2:] == [f"{worst['task']}/{worst['dimension']} .20 (.12 to .28)", "released"]
    assert row(text, "static: mean win rate") == [
        "static: mean win rate over tasks",
        "at least 0.75",
        ".850",
        ".820",
        ".740",
        ".803",
        "**missed** (2 of 3 met it)",
    ]
    assert row(text, "judge, sealed pairs: mean over")[-1] == "met" and row(text, "ema: chosen checkpoint")[-2:] == [".020", "met"]
    over = "second round over the first's release: lower bound of the"
    assert row(text, f"{over} mean")[2:] == [".480", ".480", ".480", ".480", "met"]
    assert row(text, f"{over} worst cell")[2] == ".120" and row(text, f"{over} worst cell")[-1] == "**missed** (2 of 3 met it)"
    assert row(text, "evaluation | win_rate")[-1] == "0.74 (n 600, needed 167)"
    assert row(text, "0 | text/legibility") == ["0", "text/legibility"]
    assert row(text, "fill | colour") == [
        *["fill", "colour", "110", ".60", ".55", "-.05 (-.10 to .00)", "110", ".60", ".55", "-.08 (-.13 to -.03)"],
        *["110", ".60", ".55", "-.16 (-.21 to -.11)", "-.10"],
    ]
    assert text.count("| fill | structure |") == 4  # wins of both modes, the judge, absolute quality


def test_every_target_is_missed_without_figures(tmp_path: Path) -> None:
    text = page(tmp_path, [record(0, 0.85), refused(1)])
    assert [row(text, target.what)[3] for target in targets()] == ["–"] * len(targets())
    assert {row(text, target.what)[-1] for target in targets()} == {"**missed** (1 of 2 met it)"}
    assert "refused: judge / accuracy" in text and "0.4 (n 50) **failed**" in text


def test_bounds_are_held_as_they_are_asked() -> None:
    asked = {target.what: target for target in targets()}
    assert asked["static: mean win rate over tasks"].met(record(0, 0.75)) and not asked["static: lower bound of the worst task"].met(
        record(0, 0.55)
    )
    lost = record(0, 0.8)
    lost["policy"]["ema"]["preservation_psnr"] = 29.0
    assert not asked["ema: PSNR lost outside the mask, dB"].met(lost) and asked["static: PSNR lost outside the mask, dB"].met(lost)


def test_a_cell_that_was_not_measured_may_be_the_worst() -> None:
    asked = {target.what: target for target in targets()}
    lacking = record(0, 0.85)
    for cells in (lacking["judge"]["cells"], lacking["policy"]["ema"]["cells"], lacking["policy"]["ema"]["judge_on_edits"]["cells"]):
        del cells[3]
    for what in (
        "judge, sealed pairs: worst cell",
        "judge, sealed pairs: pairs in the smallest cell",
        "judge, ema against base: worst cell",
    ):
        assert asked[what].met(record(0, 0.85)) and asked[what].measure(lacking) is None and not asked[what].met(lacking)
    assert not asked["ema: lower bound of the worst cell"].met(lacking) and asked["static: lower bound of the worst cell"].met(lacking)


def test_plots_are_there_and_small(tmp_path: Path) -> None:
    fits = [
        {
            "seed": seed,
            "commit": f"c{seed}",
            "error_rate": error,
            "labels": labels,
            "best_step": 0 if (seed, error, labels) == (0, 0.25, 250) else 90,
            "mean_accuracy": {250: 0.6, 1000: 0.7}[labels] - error / 5 + seed / 50,
        }
        for seed in (0, 1)
        for error in (0.0, 0.25)
        for labels in (250, 1000)
    ]
    text = page(tmp_path, [record(0, 0.85), refused(1)], fits)
    named = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(named) == sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "results").iterdir())
    for name in named:
        assert (tmp_path / name).stat().st_size < 100_000
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    assert "Commits: `c0`, `c1`." in text
    assert row(text, "250 |") == ["250", ".61 (.60, .62)", ".56 (.55°, .57)"]


def test_rates_are_written_as_everywhere() -> None:
    assert [rate(value) for value in (0.614, 1.0, -0.05, 0.0, 210, None)] == [".61", "1.00", "-.05", ".00", "210", "–"]
