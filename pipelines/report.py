"""`onereward run` and its report: what the run made, how long it took, and the page that shows it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from assets.chain import RELEASE
from assets.chain import STAGES as CHAIN
from assets.settings import Settings
from assets.sources import ROOT
from infra.stores.base import Version
from infra.workspace import Workspace
from models.errors import UnknownVersion
from models.taxonomy import Taxonomy
from ops.approval import approval_for
from ops.promote import STAGES
from ops.report import RunFacts, write_report
from pipelines.chain_run import Outcome, run_chain
from pipelines.next_round import STARTS


def run_and_report(settings: Settings, workspace: Workspace) -> tuple[Outcome, Path | None]:
    """Run the chain and write `<home>/reports/<n>/`. An interrupted run, or one that made nothing, gets no report."""
    source = commit()  # of what runs: the tree may move on meanwhile
    with dg.DagsterInstance.get() as instance:
        outcome = run_chain(settings, instance)
    if outcome.artifacts and len(outcome.reused) == len(outcome.artifacts):
        print(f"everything reused: {len(outcome.reused)} artifacts unchanged")
    if outcome.ending == "interrupted" or not outcome.artifacts:
        return outcome, None
    store = workspace.store
    folders = {name: store.get(ref) for name, ref in outcome.artifacts.items()}  # reads every byte: part of the run's time
    versions = {name: store.version(ref.digest) for name, ref in outcome.artifacts.items()}
    release = _release(workspace, outcome)
    wall_s = time.time() - psutil.Process().create_time()  # with the libraries' imports; writing the page adds less than a second
    _, page = write_report(
        workspace.reports / str(1 + max(_numbers(workspace), default=0)),
        folders=folders,
        versions=versions,
        run=RunFacts(
            wall_s=round(wall_s, 1),
            peak_rss_gb=round(peak_rss_gb(), 3),
            overhead_share=round(max(0.0, 1 - outcome.work_s / wall_s), 4),
            commit=source,
            gates=outcome.gates,
            release=release,
            starts=_starts(workspace, versions),
            refused=outcome.message if outcome.ending == "refused" else None,
            reused=outcome.reused,
            stage_seconds=outcome.seconds,
        ),
        taxonomy=Taxonomy.load(ROOT / settings.taxonomy if settings.taxonomy else None),
    )
    return outcome, page


def _release(workspace: Workspace, outcome: Outcome) -> dict[str, Any] | None:
    """The release this run ended with and the highest stage that points to it."""
    ref = outcome.artifacts.get(RELEASE.name)
    if ref is None:
        return None
    stages = [stage for stage in reversed(STAGES) if (there := workspace.store.stage(RELEASE.name, stage)) and there.digest == ref.digest]
    approval = approval_for(workspace.store, workspace.keys, ref)
    facts = {"version": workspace.store.version(ref.digest).number, "stage": stages[0] if stages else None, "digest": ref.digest}
    return {**facts, "approval": str(approval)} if approval else facts


def _starts(workspace: Workspace, versions: Mapping[str, Version]) -> list[dict[str, Any]]:
    """The release that a round went on from: its number, its digest, and what was made with it. Settings may name several."""
    found: dict[str, dict[str, Any]] = {}
    for name in (artifact for stage in CHAIN if stage.name in STARTS for artifact in stage.artifacts if artifact in versions):
        for parent in (each for each in versions[name].parents if each.name == RELEASE.name):
            start = {"version": workspace.store.version(parent.digest).number, "digest": parent.digest, "made": []}
            found.setdefault(parent.digest, start)["made"].append(name)
    return list(found.values())


def _numbers(workspace: Workspace) -> list[int]:
    return [int(folder.name) for folder in workspace.reports.iterdir() if folder.name.isdigit()]


def find_report(workspace: Workspace, number: int | None) -> Path:
    """Folder of a run's report, the latest without a number. Raises UnknownVersion."""
    numbers = _numbers(workspace)
    if not numbers or (number is not None and number not in numbers):
        known = f"There are {', '.join(map(str, sorted(numbers)))}." if numbers else "Run the chain first: `onereward run`."
        raise UnknownVersion(f"There is no report{'' if number is None else f' {number}'}.", known)
    return workspace.reports / str(max(numbers) if number is None else number)


def headline(folder: Path) -> str:
    """How the run ended, in a few lines."""
    facts = json.loads((folder / "report.json").read_text())
    lines = [f"run {folder.name}: {facts['wall_s']:.0f} s, peak {facts['peak_rss_gb']:.1f} GB, commit {facts['commit'][:12]}"]
    if facts["judge"]:
        judge = facts["judge"]
        accuracy = f"accuracy {_share(judge['mean_accuracy'])}, base {_share(judge['base_mean_accuracy'])}"
        lines.append(f"judge: {accuracy}, mean over {len(judge['cells'])} cells, {judge['n']} {judge['split']} pairs")
    for mode, figures in (facts["policy"] or {}).items():
        lines.append(f"policy {mode}: win rate {_share(figures['mean_win_rate'])}, {figures['conditions']} conditions")
    lines += [f"refused: {facts['refused']}"] if facts["refused"] else []
    if facts["release"]:
        lines.append(
            f"release v{facts['release']['version']} ({facts['release']['digest'][:8]}): {facts['release']['stage'] or 'in no stage'}"
        )
        lines += [facts["release"]["approval"]] if "approval" in facts["release"] else []
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def peak_rss_gb() -> float:
    """Peak resident memory of this process plus that of its largest finished child, GB (10^9 bytes): an upper bound."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + children) * unit / 1e9


def commit() -> str:
    """The repository's commit, with `+` behind it when the tree has changes; `unknown` outside a clone.

    What a bench writes into the tree, results and pages, changes nothing that runs.
    """
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
