"""What tests/ops/test_train_policy.py starts by `accelerate launch`: the policies of JOBS, trained by every process together.

    accelerate launch --multi_gpu --num_processes 2 -m tests.ops.launched_policy JOBS.json

Each job is {"parts": [flux, judge, curated], "config": {...}, "mode": .., "out": .., "scratch": ..}. A ConfigError is written to
`out`/refused-<rank>.txt; of a run that ends every process keeps its trained weights and shadows in `scratch`/rank-<rank>.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from infra.progress import Progress
from models.errors import ConfigError
from models.taxonomy import Taxonomy
from ops.policy_config import TrainPolicyConfig
from ops.train_policy import Trainer, train_policy


class Kept(Trainer):
    """Leaves itself in `last`, so that what a process holds can be looked at."""

    last: Kept

    def __init__(self, *arguments):
        Kept.last = self
        super().__init__(*arguments)


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    for job in json.loads(jobs.read_text()):
        config, parts = TrainPolicyConfig(**job["config"]), [Path(part) for part in job["parts"]]
        out, scratch = Path(job["out"]), Path(job["scratch"])
        try:
            train_policy(config, *parts, out, Progress(print), Taxonomy.load(), job["mode"], scratch, Kept)
        except ConfigError as error:
            (out / f"refused-{Kept.last.accelerator.process_index}.txt").write_text(str(error))
            continue
        trainer, held = Kept.last, {}
        for name in trainer.parameters:
            held |= {f"policy.{name}": trainer.parameters[name].detach(), f"reference.{name}": trainer.reference.values[name]}
            held[f"average.{name}"] = trainer.average.values[name].clone()  # in ema it is the reference
        save_file(held, scratch / f"rank-{trainer.accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
