"""How assets find what they are made from: `ArtifactRef`s travel in the metadata of materializations.

A parent's artifact is the one this run made, else the latest one materialised. Stage names ("production") are resolved by
the first step of a run, whichever it is, and kept in the run's tags. An artifact whose latest gate evidence says no is not
handed on: blocking checks only stop the run they belong to, so a second run or an automation has to be stopped here.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from infra.signing import Keys
from infra.stores.base import ArtifactRef, ArtifactStore
from models.errors import GateRefused, UnknownVersion
from ops.gate import evidence_for
from ops.lineage import RELEASE
from ops.promote import STAGES

ARTIFACTS = "artifacts"
LOOK_BACK = 50  # materializations of a parent that are searched for all its partitions
TAG = "onereward/"  # and a stage: the run's tag with the digest it pointed to
NONE = "none"
HOST_TAG = f"{TAG}host"  # where a run's process is: its number says nothing on another machine
HOST = socket.gethostname()


def artifacts_metadata(refs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """The metadata entry that carries refs to the assets below."""
    return {ARTIFACTS: dg.MetadataValue.json({name: asdict(ref) for name, ref in refs.items()})}


def artifacts_of(event: dg.AssetMaterialization) -> dict[str, ArtifactRef]:
    """The refs that a materialization carries, by artifact name."""
    entry = event.metadata.get(ARTIFACTS)
    if not isinstance(entry, dg.JsonMetadataValue) or not isinstance(entry.data, dict):
        return {}
    return {name: ArtifactRef(**fields) for name, fields in entry.data.items()}


def materialised(instance: dg.DagsterInstance, asset: str, run_id: str = "") -> dict[str, ArtifactRef]:
    """The artifacts of an asset by name: those of `run_id` first, else the latest."""
    records = instance.fetch_materializations(dg.AssetKey(asset), limit=LOOK_BACK).records
    found: dict[str, ArtifactRef] = {}
    for record in sorted(records, key=lambda record: record.run_id != run_id):  # stable: newest first within both groups
        if event := record.asset_materialization:
            for name, ref in artifacts_of(event).items():
                found.setdefault(name, ref)
    return found


def parent_refs(context: dg.AssetExecutionContext, store: ArtifactStore, keys: Keys, parents: Sequence[str]) -> dict[str, ArtifactRef]:
    """The artifacts of every parent that may be used, by artifact name.

    Raises UnknownVersion for a parent that was never materialised, GateRefused where a gate said no to all its artifacts.
    """
    found: dict[str, ArtifactRef] = {}
    for parent in parents:
        refs = materialised(context.instance, parent, context.run_id)
        if not refs:
            raise UnknownVersion(f"{parent} was never materialised.", f"Materialise {parent} first.")
        usable = trusted(store, keys, refs)
        if not usable:
            shown = ", ".join(f"{name} {ref.digest[:8]}" for name, ref in refs.items())
            raise GateRefused(f"A gate refused {shown}.", f"See the checks of {parent}; nothing is made from it.")
        found.update(usable)
    return found


def trusted(store: ArtifactStore, keys: Keys, refs: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """`refs` without those whose latest gate evidence says no. One without evidence stays: promotion will ask for it."""
    passed: dict[str, ArtifactRef] = {}
    for name, ref in refs.items():
        evidence = evidence_for(store, keys, ref)
        if evidence is None or evidence.passed:
            passed[name] = ref
    return passed


def pinned(context: dg.AssetExecutionContext, store: ArtifactStore) -> dict[str, ArtifactRef | None]:
    """The release that every stage pointed to when this run's first step began: a promotion meanwhile does not change a run under way."""
    tags = context.instance.get_run_by_id(context.run_id).tags
    if missing := [stage for stage in STAGES if TAG + stage not in tags]:
        releases = {stage: store.stage(RELEASE, stage) for stage in missing}
        tags = {**tags, **{TAG + stage: ref.digest if ref else NONE for stage, ref in releases.items()}}
        context.instance.add_run_tags(context.run_id, {TAG + stage: tags[TAG + stage] for stage in missing})
    return {stage: None if tags[TAG + stage] == NONE else store.version(tags[TAG + stage]).ref for stage in STAGES}
