"""The policies of a finished home, trained again by today's code from what the home holds: are they the same, and what would be delivered?

    python -m benchmarks.replay --home .bench/bench-0 --records bench-0 bench-0-next

A home has a version of each mode per round; `--records` names the folder of benchmarks/results/records/ behind each. Every version is
trained with the configuration and from the parents that are stored with it. Where everything that its records say of its checkpoints
comes out again, they are replaced by the new ones, which hold what was not recorded then (`blind_win`); a difference ends with exit
code 1 and leaves them. Homes from before 4484215 differ: the VAE works in another memory order since, which moves last bits. The
choice of a checkpoint is the one thing that may differ: both are printed with the truth there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, pack, unpacked
from infra.data import ensure_data
from infra.progress import Progress
from infra.stores.base import ArtifactStore, Version
from infra.workspace import Workspace
from models.taxonomy import Taxonomy
from ops.lineage import RELEASE
from ops.policy_watch import choose, summary
from ops.probe import CHECKPOINTS, Look, hacked, over_optimised, read_checkpoints
from ops.train_policy import MODES, TrainPolicyConfig, train_policy
from pipelines.config import load_settings

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--records", nargs="+", required=True, help="names of the records of its rounds, in order")
    parser.add_argument("--threads", type=int, default=1, help="as in the run that is replayed: sums depend on it in their last bits")
    arguments = parser.parse_args()
    if not arguments.home.is_dir():
        parser.error(f"there is no home {arguments.home}")
    torch.set_num_threads(arguments.threads)
    ensure_data(ROOT)
    store, different = Workspace(arguments.home.resolve()).store, 0
    for mode in MODES:
        versions = store.versions(f"policy-{mode}")
        if len(versions) != len(arguments.records):
            parser.error(f"{arguments.home} holds {len(versions)} versions of policy-{mode}: name the records of each")
        for name, version in zip(arguments.records, versions, strict=True):
            folder, file = RESULTS / "records" / name, f"policy-{mode}-{CHECKPOINTS}"
            rows, config = replay(store, version, mode)
            same = alike(unpacked(folder, file), rows)
            different += not same
            if same:
                pack(folder, file, "".join(json.dumps(row) + "\n" for row in rows).encode())
            print(f"{name} {mode}: {'the same' if same else 'NOT the same'}; {verdict(rows, version, config)}", flush=True)
    raise SystemExit(bool(different))


def replay(store: ArtifactStore, version: Version, mode: str) -> tuple[list[Look], TrainPolicyConfig]:
    """What today's code records of the checkpoints of a policy's training, and the configuration that was stored with it."""
    parents = {ref.name: store.get(ref) for ref in version.parents}
    config = TrainPolicyConfig(**{name: value for name, value in version.config.items() if name in TrainPolicyConfig.model_fields})
    base = parents[RELEASE] / "model" if RELEASE in parents else ROOT / load_settings("mini").flux  # as of bench too
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder) / "out", Path(folder) / "scratch"
        out.mkdir()
        inputs = base, parents["reward_model"], parents["curated_dataset"], out
        train_policy(config, *inputs, Progress(), Taxonomy.load(), mode=mode, scratch=scratch)
        return read_checkpoints(out / CHECKPOINTS), config


def alike(told: list[dict[str, Any]], rows: list[Look]) -> bool:
    """Whether the rows repeat every record, with what was recorded then."""
    return len(told) == len(rows) and all(record.items() <= row.items() for record, row in zip(told, rows, strict=True))


def verdict(rows: list[Look], version: Version, config: TrainPolicyConfig) -> str:
    """Which checkpoint was delivered and which would be now, with the truth of both, and what the probe says of each step."""
    truth = {point["step"]: point["measure_win"] for point in summary(rows)}
    left_out = [step for step in truth if over_optimised(rows, step)]
    then, now = version.metadata["best_step"], choose(rows, config.enough, left_out)
    assert now is not None
    steps = ", ".join(
        f"{step} {truth[step]:.3f}{' over-optimised' * (step in left_out)}{' hacked' * bool(hacked(rows, delivered=step))}"
        for step in truth
    )
    return f"delivered {then}, now {now} (by the truth {truth[then]:.3f} and {truth[now]:.3f}); {steps}"


if __name__ == "__main__":
    main()
