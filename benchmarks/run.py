"""The full learning run with several seeds, and the page about it: what `make bench` calls. Not a unit test: up to an hour a seed.

    python -m benchmarks.run --seeds 0 1 2 --homes .bench --next-round
    python -m benchmarks.run --seeds 0 --threads 1 & python -m benchmarks.run --seeds 1 2 --threads 1      # side by side
    python -m benchmarks.run --preset my.yaml --out results.json

Each seed runs the preset in a home of its own, with that seed in every stage that draws. With `--homes` the home stays, and an
interrupted seed goes on where it stood; without, it is removed. A seed's figures are written as soon as its run ends, refusals
included, to `benchmarks/results/<preset>.json`, and the records behind them into the folder `records` beside it
(benchmarks/records.py). Called again, a seed that the same commit has run already is not run twice. A tree with changes is no
commit: there every seed is run. A home in which another commit has released is refused. `--next-round` runs, after a seed that was
promoted, the chain once more in the same home with `onereward run --next-round`. The page is docs/results.md
(benchmarks/results_page.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.records import keep_records
from benchmarks.results_page import write_page
from benchmarks.rows import keep, machine, rows
from infra.workspace import Workspace
from models.errors import ConfigError
from ops.probe import CHECKPOINTS, JUDGE, SECOND, TRUTH, over_steps, read_checkpoints
from pipelines.config import load_settings, preset_path
from pipelines.report import commit, find_report

ROOT = Path(__file__).parents[1]
PRESET = "bench"
SEEDS = (0, 1, 2)  # declared before the first of them was run
DRAWS = ("source_images", "curated_dataset", "candidates", "preferences", "reward_model", "policy", "evaluation")
KEPT = (
    "wall_s",
    "peak_rss_gb",
    "overhead_share",
    "commit",
    "stages",
    "reused",
    "judge",
    "training",
    "evidence",
    "split",
    "sampling",
    "chosen_on",
    "policy",
    "best_mode",
    "against_production",
    "absolute",
    "seen",
    "photos",
    "withheld",
    "onnx",
    "engine",
    "gates",
    "release",
    "refused",
)


def write_seeded(preset: str, seed: int, path: Path, threads: int | None = None) -> None:
    """Write a preset that extends another, with that seed in every stage that draws."""
    own = {"extends": str(preset_path(preset).resolve()), **{stage: {"seed": seed} for stage in DRAWS}}
    path.write_text(yaml.safe_dump(own | ({"threads": threads} if threads else {})))


def home_name(preset: str, seed: int) -> str:
    """A seed's folder under `--homes`."""
    return f"{preset_path(preset).stem}-{seed}"


def unmoved(home: Path, source: str) -> None:
    """Raises ConfigError where another commit has put a release into production there: a first round would be held against it."""
    reports = (json.loads(path.read_text()) for path in sorted(Workspace(home).reports.glob("*/report.json")))
    for report in reports:
        if (report["release"] or {}).get("stage") == "production" and (report["commit"] != source or source.endswith("+")):
            raise ConfigError(
                f"Commit {report['commit'][:13]} has put a release into production in {home}.", "Remove it, or name other --homes."
            )


@contextmanager
def home_of(homes: Path | None, preset: str, seed: int) -> Iterator[Path]:
    """The seed's home: one that stays, or one that goes with the block."""
    if homes is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        folder = homes.resolve() / home_name(preset, seed)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def run_chain(preset: Path, home: Path, records: Path, *options: str) -> dict[str, Any]:
    """One chain in that home; its report's figures. What they were computed from is kept in `records`.

    Raises CalledProcessError when it fails (a refusal is no failure).
    """
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", str(preset), "--home", str(home), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    folder = find_report(Workspace(home), None)
    report = json.loads((folder / "report.json").read_text())
    keep_records(folder, records)
    return {**{key: report.get(key) for key in KEPT}, "curves": curves(folder)}


def curves(report: Path) -> dict[str, list[dict[str, Any]]]:
    """Mode -> step -> mean, lower and upper bound of what the judges said and of what was true, over all tasks of the validation split.

    The judges' entries are mean P(Yes), the truth's a win rate: ops/probe.py.
    """
    found = {}
    for path in sorted(report.glob(f"policy-*-{CHECKPOINTS}")):
        looks = read_checkpoints(path)
        at: dict[int, dict[str, Any]] = {}
        for name in (JUDGE, SECOND, TRUTH):
            for step, estimate in over_steps(looks, name):
                at.setdefault(step, {"step": step})[name] = [estimate.mean, estimate.lo, estimate.hi]
        found[path.name.removeprefix("policy-").removesuffix(f"-{CHECKPOINTS}")] = list(at.values())
    return found


def second_round(first: dict[str, Any], preset: Path, home: Path, records: Path) -> dict[str, Any]:
    """The next round's figures, or why there is none."""
    if (first["release"] or {}).get("stage") != "production":
        return {"skipped": f"the first round was refused: {first['refused']}" if first["refused"] else "the first round was not promoted"}
    return run_chain(preset, home, records, "--next-round")


def bench(
    preset: str, seeds: Sequence[int], out: Path, *, homes: Path | None = None, threads: int | None = None, next_round: bool = False
) -> list[dict[str, Any]]:
    """Run the seeds that `out` does not hold for this preset, machine and commit, and write each as it ends; all that it holds then."""
    settings = load_settings(preset).model_dump(mode="json")
    threads = threads or settings["threads"]
    for seed in seeds:
        source = commit()
        about = {"preset": settings, "machine": machine(), "threads": threads, "commit": source}
        same = [row for row in rows(out) if row["seed"] == seed and about.items() <= row.items() and not row["commit"].endswith("+")]
        run = same[0] if same else None
        if run and (not next_round or "next_round" in run):
            print(f"seed {seed} has been run already: {out}")
            continue
        with home_of(homes, preset, seed) as home:
            if run is None:
                unmoved(home, source)
            seeded, records = home / "preset.yaml", out.parent / "records" / home_name(preset, seed)
            write_seeded(preset, seed, seeded, threads)
            if run is None or homes is None:
                command = f"python -m benchmarks.run --preset {preset_path(preset).stem} --seeds {seed} --threads {threads}"
                run = {"seed": seed, "command": command, **about, **run_chain(seeded, home, records)}
                keep(out, run, "seed")
            if next_round:
                both = {
                    **run,
                    "command": f"{run['command']} --next-round",
                    "next_round": second_round(run, seeded, home, records.with_name(f"{records.name}-next")),
                }
                keep(out, both, "seed")
    return rows(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--homes", type=Path, help="folder in which each seed's home stays")
    parser.add_argument("--threads", type=int, help="threads of each chain; the preset's without it")
    parser.add_argument("--next-round", action="store_true", help="a second round in the same home after a seed that was promoted")
    arguments = parser.parse_args()
    name = preset_path(arguments.preset).stem
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    runs = bench(arguments.preset, arguments.seeds, out, homes=arguments.homes, threads=arguments.threads, next_round=arguments.next_round)
    for run in runs:
        rates = {mode: round(figures["mean_win_rate"], 3) for mode, figures in (run["policy"] or {}).items()}
        accuracy = run["judge"] and round(run["judge"]["mean_accuracy"], 3)
        print(f"seed {run['seed']}: judge {accuracy}, win rates {rates}, refused: {run['refused']}")
    if name == PRESET:
        print(write_page(out))


if __name__ == "__main__":
    main()
