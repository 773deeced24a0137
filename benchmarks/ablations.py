"""Ablations: one setting changed at a time, over several seeds, into benchmarks/results/ablations.json and docs/ablations.md.

    python -m benchmarks.ablations                                        # every arm on seeds 3 4 5: hours
    python -m benchmarks.ablations --seeds 3 --arms 'judge/*'             # a part; patterns as the shell's, several if you like
    python -m benchmarks.ablations --collect                              # write the results from what the work folder holds

An arm's figures lie in `<work>/<seed>/arms/<arm>.json` as soon as it ends, and an arm that lies there is not run again: start it anew
after an interruption, or start several processes on one work folder, each with seeds of its own. Arms that the results file holds of
the same preset are taken from it, so that another machine can go on with what is committed; each row names its commit. An arm that
cannot be run is recorded with its error. The results are written when a process ends, from everything that lies there then; after the
last, all.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation_arms import ARMS
from benchmarks.ablation_page import write_page
from benchmarks.ablation_world import World
from benchmarks.rows import machine
from infra.data import ensure_data
from infra.disk import replacing
from infra.progress import Progress
from models.errors import OneRewardError
from pipelines.config import load_settings
from pipelines.report import commit

ROOT = Path(__file__).parents[1]
SEEDS = (3, 4, 5)  # ours: `make bench` has the scenes of 0, 1 and 2, which no ablation is to look at
PRESET = "ablations"
THREADS = "OMP_NUM_THREADS"


def chosen(patterns: list[str]) -> list[str]:
    """Names of the arms that one of the patterns fits, in order."""
    return [arm for arm in ARMS if any(fnmatch(arm, pattern) for pattern in patterns)]


def arm_file(work: Path, seed: int, arm: str) -> Path:
    """Where an arm's figures lie."""
    return work / str(seed) / "arms" / f"{arm}.json"


def restore(preset: str, out: Path, work: Path) -> int:
    """Lay the arms that `out` holds of this preset, as it is now, into `work`, but for those with an error; how many were not there."""
    record = json.loads(out.read_text()) if out.exists() else {}
    if record.get("preset") != load_settings(preset).model_dump(mode="json"):
        return 0
    missing = [row for row in record["rows"] if "figures" in row and not arm_file(work, row["seed"], row["arm"]).exists()]
    for row in missing:
        place = arm_file(work, row["seed"], row["arm"])
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as draft:
            draft.write_text(json.dumps(row, indent=2) + "\n")
    return len(missing)


def run(preset: str, seeds: list[int], arms: list[str], work: Path, progress: Progress) -> None:
    """Measure every arm on every seed that `work` does not hold yet. Raises what making a seed's data raises."""
    source = commit()  # of what runs: the tree may move on meanwhile
    for seed in seeds:
        world = World(work / str(seed), preset, seed, progress)
        for number, arm in enumerate(arms, start=1):
            place = arm_file(work, seed, arm)
            where = f"seed {seed}, arm {number} of {len(arms)}, {arm}"
            if place.exists():
                progress.say(f"{where}: measured already")
                continue
            progress.say(f"{where} begins")
            place.parent.mkdir(parents=True, exist_ok=True)
            _ = world.pairs  # made before the arm's time is taken; without them no arm can be run
            start = time.monotonic()
            row: dict[str, Any] = {"arm": arm, "seed": seed, "commit": source}
            try:
                row["figures"] = ARMS[arm].measure(world)
            except OneRewardError as error:
                row["error"] = f"{type(error).__name__}: {error.what}"
            row["seconds"] = round(time.monotonic() - start, 1)
            with replacing(place) as draft:
                draft.write_text(json.dumps(row, indent=2) + "\n")
            progress.say(f"{where}: {row.get('error', 'done')}, {row['seconds']:.0f} s")


def collect(preset: str, work: Path, out: Path, page: Path) -> dict[str, Any]:
    """Write results and page from every arm in `work`, and return the results."""
    drafts = ".draft.json"  # of an arm that another process is just writing, or was when it was killed
    rows = [json.loads(path.read_text()) for path in work.glob("*/arms/*/*.json") if not path.name.endswith(drafts)]
    order = list(ARMS)
    rows = sorted((row for row in rows if row["arm"] in ARMS), key=lambda row: (order.index(row["arm"]), row["seed"]))
    seeds = sorted({row["seed"] for row in rows})
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.ablations", "--preset", preset, "--seeds", *map(str, seeds)]),
        "commits": sorted({row["commit"] for row in rows}),
        "machine": machine(),
        "preset": load_settings(preset).model_dump(mode="json"),
        "seeds": seeds,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        draft.write_text(json.dumps(record, indent=1) + "\n")
    write_page(record, page)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", default=["*"], help=f"patterns of {', '.join(ARMS)}")
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--work", type=Path, default=ROOT / ".onereward" / "ablations", help="data, judges and what each arm gave")
    parser.add_argument("--collect", action="store_true", help="measure nothing more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ablations.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "ablations.md")
    arguments = parser.parse_args()
    arms = chosen(arguments.arms)
    if not arms:
        parser.error(f"no arm fits {' '.join(arguments.arms)}: there are {', '.join(ARMS)}")
    if restored := restore(arguments.preset, arguments.out, arguments.work):
        print(f"{restored} results are taken from {arguments.out}")
    if not arguments.collect:
        settings = load_settings(arguments.preset)
        if any(source.startswith("data/") for source in (settings.flux, settings.judge)):
            ensure_data(ROOT)
        torch.set_num_threads(int(os.environ.get(THREADS, settings.threads)))
        run(arguments.preset, arguments.seeds, arms, arguments.work, Progress(lambda line: print(line, flush=True)))
    record = collect(arguments.preset, arguments.work, arguments.out, arguments.page)
    print(f"{len(record['rows'])} results of seeds {record['seeds']}: {arguments.out}, {arguments.page}")


if __name__ == "__main__":
    main()
