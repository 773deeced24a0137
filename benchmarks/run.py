"""The full learning run, several seeds: what `make bench` calls. Not a unit test: about ten minutes a seed on two cores.

    python -m benchmarks.run --seeds 0 1 2

Each seed runs the mini preset in a home of its own, with that seed in every stage that draws. The figures of all runs go to
`benchmarks/results/mini.json` with command, commit and machine; nothing is left out, refusals included.
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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mini.json"
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


def run_seed(seed: int, home: Path) -> dict[str, Any]:
    """One chain in `home`; returns its report's figures. Raises CalledProcessError when the chain fails (a refusal is no failure)."""
    preset = home / "preset.yaml"
    preset.write_text(yaml.safe_dump({"extends": "mini", **{stage: {"seed": seed} for stage in DRAWS}}))
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", str(preset), "--home", str(home)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    newest = max(home.glob("reports/*/report.json"), key=lambda path: path.stat().st_mtime)
    report = json.loads(newest.read_text())
    return {"seed": seed, **{key: report.get(key) for key in KEPT}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as home:
            runs.append(run_seed(seed, Path(home)))
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "command": f"python -m benchmarks.run --seeds {' '.join(map(str, seeds))}",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    for run in runs:
        rates = {mode: round(figures["mean_win_rate"], 3) for mode, figures in (run["policy"] or {}).items()}
        accuracy = run["judge"] and round(run["judge"]["mean_accuracy"], 3)
        print(f"seed {run['seed']}: judge {accuracy}, win rates {rates}, refused: {run['refused']}")


if __name__ == "__main__":
    main()
