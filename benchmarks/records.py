"""The records behind the committed figures of a run, kept beside them, and the figures computed from those records again.

    python -m benchmarks.records                                              # every committed run; a difference ends with exit code 1
    python -m benchmarks.records --default .onereward/reports/1               # a report of `make run` becomes the committed default run

`benchmarks/results/records/<name>/` holds what a report's folder holds, compressed: a line per edit with every score of it, a line per
sealed pair and judge, a line per look at a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import machine, rows
from infra.disk import replacing
from models.records import Pair
from models.taxonomy import Taxonomy
from ops.judge_accuracy import summarise
from ops.policy_watch import summary
from ops.probe import CHECKPOINTS
from ops.win_rates import ITEMS, PAIRS, TIE_TOLERANCE, recompute

RESULTS = Path(__file__).parent / "results"
ZIPPED, DEFAULT = ".xz", "default_run"
SAME = 1e-9  # relative: sums in another order


def keep_records(report: Path, folder: Path) -> None:
    """Compress the records of a report's folder into another, which holds nothing else afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for path in (report / ITEMS, report / PAIRS, *sorted(report.glob(f"policy-*-{CHECKPOINTS}"))) if path.exists()]
    for path in found:
        with replacing(folder / f"{path.name}{ZIPPED}") as draft:
            draft.write_bytes(lzma.compress(path.read_bytes()))
    for stale in set(folder.iterdir()) - {folder / f"{path.name}{ZIPPED}" for path in found}:  # a run that was refused has fewer
        stale.unlink()


def unpacked(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of kept records, none where there are none."""
    path = folder / f"{name}{ZIPPED}"
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()] if path.exists() else []


def recomputed(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The figures of a run's win rates, of its judge and of its checkpoints, as its report has them, from the records alone."""
    taxonomy = Taxonomy.load()
    found: dict[str, Any] = {}
    if items := unpacked(folder, ITEMS):
        how = {"split": run["split"], "choose_split": run["chosen_on"], "tie_tolerance": TIE_TOLERANCE, "evidence": run["evidence"]}
        found |= recompute(items, taxonomy, **how)
    if pairs := unpacked(folder, PAIRS):
        judges = {name: _accuracy([row for row in pairs if row["judge"] == name], taxonomy) for name in ("judge", "base")}
        found["judge"] = judges["judge"] | {"base_mean_accuracy": judges["base"]["mean_accuracy"]}
        for cell, before in zip(found["judge"]["cells"], judges["base"]["cells"], strict=True):
            cell["base_accuracy"] = before["accuracy"]
    looks = {mode: unpacked(folder, f"policy-{mode}-{CHECKPOINTS}") for mode in run["training"] or {}}
    found["training"] = {mode: {"looks": summary(lines)} for mode, lines in looks.items()}
    return found


def _accuracy(lines: list[dict[str, Any]], taxonomy: Taxonomy) -> dict[str, Any]:
    pairs = [Pair(**{name: line[name] for name in Pair.model_fields}) for line in lines]
    orders = (torch.tensor([line[name] for line in lines], dtype=torch.float64).logit() for name in ("p_winner_first", "p_loser_first"))
    return summarise(taxonomy, pairs, [line["origin"] for line in lines], *orders)


def differences(told: Any, found: Any, place: str = "") -> Iterator[str]:
    """Every figure under a name that both have which is not the same, as "policy.static.tasks.0.win_rate: told .61, found .62"."""
    if isinstance(told, dict) and isinstance(found, dict):
        for name in told.keys() & found.keys():
            yield from differences(told[name], found[name], f"{place}.{name}" if place else name)
    elif isinstance(told, list) and isinstance(found, list) and len(told) == len(found):
        for number, both in enumerate(zip(told, found, strict=True)):
            yield from differences(*both, f"{place}.{number}")
    elif not (told == found or (isinstance(told, float) and isinstance(found, (int, float)) and math.isclose(told, found, rel_tol=SAME))):
        yield f"{place}: told {told}, found {found}"


def committed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of the records and figures of every run whose figures are committed."""
    for run in rows(RESULTS / "bench.json"):
        yield f"bench-{run['seed']}", run
        if "policy" in run.get("next_round", {}):  # it may not have been asked for, or follow a refusal
            yield f"bench-{run['seed']}-next", run["next_round"]
    yield DEFAULT, json.loads((RESULTS / f"{DEFAULT}.json").read_text())


def keep_default(report: Path) -> None:
    """The figures of a run of the mini preset, and the records behind them."""
    told = {"command": "make run", "machine": machine(), **json.loads((report / "report.json").read_text())}
    keep_records(report, RESULTS / "records" / DEFAULT)
    with replacing(RESULTS / f"{DEFAULT}.json") as draft:
        draft.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", type=Path, help="folder of a report of `make run`, whose figures and records are kept")
    arguments = parser.parse_args()
    if arguments.default:
        if not (arguments.default / "report.json").exists():
            parser.error(f"{arguments.default} holds no report.json: name a folder below .onereward/reports")
        return keep_default(arguments.default)
    wrong = 0
    for name, run in committed():
        found = recomputed(run, RESULTS / "records" / name)
        lines = list(differences(run, found))
        wrong += len(lines)
        print(f"{name}: {'every figure follows from the records' if found.get('policy') and not lines else 'NOT what the records say'}")
        print("".join(f"  {line}\n" for line in lines), end="")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
