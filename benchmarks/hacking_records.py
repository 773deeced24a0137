"""Records of two real runs of the mini policy, for tests/ops/test_probe.py: one with every guardrail off, one with them on.

    python -m benchmarks.hacking_records --home .onereward --out records    # after `make run`: data, candidates and labels are that home's

The judge that rewards is fitted on the labels of one half of the source images and the second judge on the other half. Each run is
measured on the first validation scenes of every task after `CHECKPOINTS` numbers of iterations (ops/policy_watch.py), as it would be
delivered then.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infra.data import ensure_data
from infra.progress import Progress
from infra.workspace import Workspace
from models.taxonomy import Taxonomy
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.policy_config import TrainPolicyConfig
from ops.policy_watch import summary
from ops.probe import Look
from ops.train_policy import Trainer
from pipelines.config import load_settings

ROOT = Path(__file__).parents[1]
PER_TASK = 32  # ours: validation conditions per task, as in the bench preset
CHECKPOINTS = {"guardrails_off": (12, 24, 36, 48, 60), "guardrails_on": (18, 36, 72)}
# Nothing that holds the policy back: no cap, every cell rewarded however badly it is judged, free to change what it should keep, the
# gradient of a single view, which points less into pictures than that of several, no average over the last iterations, and nothing that
# calls a dimension back.
NO_GUARDRAILS: dict[str, Any] = {
    "cap": 1.0,
    "least_judged": 0.0,
    "keep_weight": 0.0,
    "learning_rate": 5e-5,
    "same_noise": False,
    "by_shortfall": False,
    "jitter": 0,
    "views": 1,
    "deliver": "policy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="home of a finished run of the mini preset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two records")
    arguments = parser.parse_args()
    settings, taxonomy, store = load_settings("mini"), Taxonomy.load(), Workspace(arguments.home.resolve()).store
    curated, candidates, pairs = (store.get(store.versions(name)[-1].ref) for name in ("curated_dataset", "candidates", "preference_pairs"))
    ensure_data(ROOT)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        judge = Path(scratch)
        config = FitRewardConfig(**{**settings.stages["reward_model"], "second_share": 0.5})
        fit_reward(config, ROOT / settings.judge, curated, candidates, pairs, judge, Progress(print), taxonomy)
        for name, steps in CHECKPOINTS.items():
            section = {
                **settings.stages["policy"],
                "iterations": steps[-1],
                "watch_per_task": PER_TASK,
                **(NO_GUARDRAILS if name == "guardrails_off" else {}),
            }
            rows = records(TrainPolicyConfig(**section), ROOT / settings.flux, judge, curated, taxonomy, steps)
            lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            (arguments.out / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def records(config: TrainPolicyConfig, base: Path, judge: Path, curated: Path, taxonomy: Taxonomy, steps: Sequence[int]) -> list[Look]:
    """Train without choosing or stopping, and measure the policy after each of `steps` iterations."""
    trainer = Trainer(config, base, judge, curated, taxonomy, "static")
    for step in range(1, steps[-1] + 1):
        trainer.iterate(step - 1)
        if step in steps:
            with trainer.delivered():
                trainer.watch.look(trainer.policy, step, Progress(print), f"after {step}")
            print(summary(trainer.watch.rows)[-1], flush=True)
    return trainer.watch.rows


if __name__ == "__main__":
    main()
