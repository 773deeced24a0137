"""Gates as blocking asset checks: one factory for every stage that has gates.

A check measures, keeps its evidence in the store (promotion reads it again, by digest) and says no with ERROR severity, which
ends the run before anything is made from the artifact. A stage with several modes says no when none of them passed.
"""

import inspect
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from assets.chain import STAGES
from assets.common import Stage
from assets.display import table
from assets.refs import materialised
from assets.settings import Settings, thresholds
from assets.sources import ROOT, code_version
from infra.data import weights
from infra.stores.base import ArtifactRef, ArtifactStore
from infra.workspace import Workspace
from models.errors import UnknownVersion
from ops.gate import Gate, GateConfig, not_verified, record_evidence
from ops.gate_checks import CHECKS
from ops.gate_checks import check as measure
from ops.lineage import RELEASE, parent

GATE = "gate"  # name of every stage's check
EVALUATION = "evaluation"  # the artifact whose gates read the curated data too
EVIDENCE = "evidence"  # metadata entry with every gate's row, for reports


def gate_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """The blocking checks of every stage. Raises ConfigError for thresholds that are not valid."""
    config = thresholds(settings)
    return [_gate_check(stage, settings, config) for stage in STAGES if set(stage.artifacts) <= set(CHECKS)]


def _gate_check(stage: Stage, settings: Settings, config: GateConfig) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=dg.AssetKey(stage.name),
        name=GATE,
        blocking=True,
        description=f"May {stage.name} be used by what comes after it?",
    )
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        workspace = Workspace.from_env()
        refs = materialised(context.instance, stage.name, context.run.run_id)
        if not refs:
            raise UnknownVersion(f"{stage.name} was never materialised.", f"Materialise {stage.name} first.")
        start = time.monotonic()
        store = workspace.store
        gates = {
            name: measure(
                name,
                store.get(ref),
                config,
                base=_start(store, ref, settings) if stage.modes else None,
                curated=_curated(store, ref) if name == EVALUATION else None,
            )
            for name, ref in refs.items()
        }
        seconds = time.monotonic() - start
        for name, ref in refs.items():
            record_evidence(
                workspace.store,
                workspace.keys,
                ref,
                gates[name],
                config,
                code_version=code_version(Path(inspect.getfile(measure))),
                not_verified=not_verified(workspace.store.get(ref)),
                run_id=context.run.run_id,
                tmp=workspace.tmp,
            )
        for name in refs:
            for each in gates[name]:
                context.log.info(line(name, each))
        return result(refs, gates, seconds)

    return check


def _start(store: ArtifactStore, policy: ArtifactRef, settings: Settings) -> Path:
    """The pipeline that a policy must have moved away from: that of the release it started from, else the base's."""
    release = parent(store, policy, RELEASE)
    return store.get(release) / "model" if release else weights(settings.flux, ROOT)


def _curated(store: ArtifactStore, of: ArtifactRef) -> Path | None:
    """The curated data that a version was made from, if any."""
    curated = parent(store, of, "curated_dataset")
    return store.get(curated) if curated else None


def line(artifact: str, each: Gate) -> str:
    """One gate in one line."""
    return f"{artifact} {'passed' if each.passed else 'did not pass'} {each}"


def result(refs: Mapping[str, ArtifactRef], gates: Mapping[str, list[Gate]], seconds: float) -> dg.AssetCheckResult:
    """The verdict over all artifacts of a stage, with every measured value and threshold.

    The description leaves out gates that measured nothing where another one says why.
    """
    refused = {name: [each for each in rows if not each.passed] for name, rows in gates.items()}
    passed = any(not rows for rows in refused.values())
    metadata: dict[str, Any] = {"seconds": round(seconds, 2), "digests": {name: ref.digest for name, ref in refs.items()}}
    rows = [{"artifact": name, **asdict(each)} for name, checked in gates.items() for each in checked]
    metadata[EVIDENCE] = dg.MetadataValue.json(rows)
    metadata["gates"] = dg.MetadataValue.md(table(rows))
    prefix = len(gates) > 1
    for name, checked in gates.items():
        for each in checked:
            label = f"{name} {each.name}" if prefix else each.name
            metadata[label] = _number(each.measure)
            metadata[f"{label} threshold"] = _number(each.threshold)
    told = {name: [each for each in rows_ if each.measure is not None] or rows_ for name, rows_ in refused.items()}
    said = [line(name, each) for name, rows_ in told.items() for each in rows_]
    return dg.AssetCheckResult(
        passed=passed,
        severity=dg.AssetCheckSeverity.ERROR,
        metadata=metadata,
        description="; ".join(said) or "every gate passed",
    )


def _number(value: float | None) -> float | str:
    return "not measured" if value is None else float(value)
