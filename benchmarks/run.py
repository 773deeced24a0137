"""The full learning run, several seeds: what `make bench` calls. Not a unit test: about a quarter of an hour a seed on two cores.

    python -m benchmarks.run --seeds 0 1 2
    python -m benchmarks.run --preset my.yaml --out results.json

Each seed runs the preset in a home of its own, with that seed in every stage that draws. A seed's figures are written as soon as
its run ends, refusals included, to `benchmarks/results/<preset>.json`; called again, the seeds that the same commit has run
already are not run twice. A tree with changes is no commit: there every seed is run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from infra.workspace import Workspace
from pipelines.config import DEFAULT, load_settings, preset_path
from pipelines.report import commit, find_report

ROOT = Path(__file__).parents[1]
DRAWS = ("source_images", "curated_dataset", "candidates", "preferences", "reward_model", "policy", "evaluation")
KEPT = (
    "wall_s",
    "peak_rss_gb",
    "overhead_share",
    "commit",
    "judge",
    "policy",
    "best_mode",
    "onnx",
    "engine",
    "gates",
    "release",
    "refused",
)


def machine() -> dict[str, Any]:
    """What figures were taken on."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def write_seeded(preset: str, seed: int, path: Path) -> None:
    """Write a preset that extends another, with that seed in every stage that draws."""
    path.write_text(yaml.safe_dump({"extends": str(preset_path(preset).resolve()), **{stage: {"seed": seed} for stage in DRAWS}}))


def run_seed(preset: str, seed: int) -> dict[str, Any]:
    """One chain in a home of its own; its report's figures. Raises CalledProcessError when it fails (a refusal is no failure)."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        seeded = home / "preset.yaml"
        write_seeded(preset, seed, seeded)
        command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", str(seeded), "--home", str(home)]
        subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads((find_report(Workspace(home), None) / "report.json").read_text())
    return {"seed": seed, **{key: report.get(key) for key in KEPT}}


def bench(preset: str, seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """Run the seeds that `out` does not hold for this preset and commit, and write it after each; all of its runs, by seed."""
    settings = load_settings(preset)
    head = {
        "preset": settings.model_dump(mode="json"),
        "machine": machine(),
    }
    known = json.loads(out.read_text()) if out.exists() else {}
    same = all(known.get(name) == value for name, value in head.items())
    source = commit()
    runs = {run["seed"]: run for run in known.get("runs", []) if same and run["commit"] == source and not source.endswith("+")}
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if seed in runs:
            print(f"seed {seed} has been run already: {out}")
            continue
        runs[seed] = run_seed(preset, seed)
        draft = out.with_name(f"{out.name}.draft")
        draft.write_text(json.dumps({**head, "runs": [runs[each] for each in sorted(runs)]}, indent=2) + "\n")
        draft.replace(out)
    return [runs[seed] for seed in sorted(runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default=DEFAULT)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{preset_path(arguments.preset).stem}.json"
    for run in bench(arguments.preset, arguments.seeds, out):
        rates = {mode: round(figures["mean_win_rate"], 3) for mode, figures in (run["policy"] or {}).items()}
        accuracy = run["judge"] and round(run["judge"]["mean_accuracy"], 3)
        print(f"seed {run['seed']}: judge {accuracy}, win rates {rates}, refused: {run['refused']}")


if __name__ == "__main__":
    main()
