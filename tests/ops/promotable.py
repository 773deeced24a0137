"""A chain in a registry with all evidence, from sources to releases, made of a file or two each: what promotion is tested on."""

import json
import shutil
from pathlib import Path

from infra.signing import Keys
from infra.stores.base import ArtifactRef, StageMove
from infra.stores.dvc import DvcStore
from ops import promote as promotion
from ops.approval import Approval, Terms, approve
from ops.gate import REQUIRED_GATES, SIGNATURE, Gate, GateConfig, record_evidence
from ops.promote import MOVES

BY = {"approver": "kim", "reason": "test"}
SHIPPED = GateConfig()
Refs = dict[str, ArtifactRef]


def keys_of(store: DvcStore) -> Keys:
    """The keys of the home that a registry lies in."""
    return Keys(store.root.parent / "keys")


def promote(
    store: DvcStore, ref: ArtifactRef, stage: str, *, thresholds: GateConfig = SHIPPED, terms: Terms = Terms(), **by: str
) -> StageMove:
    """Take a release up to a stage, through those before it."""
    way = [target for _, target in MOVES]
    for name in way[: way.index(stage) + 1] if stage in way else [stage]:
        move = promotion.promote(store, keys_of(store), ref, name, thresholds=thresholds, terms=terms, **(by or BY))
    return move


def put(store: DvcStore, work: Path, name: str, parents: list[ArtifactRef], *, mode: str = "ema", note: str = "") -> ArtifactRef:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "metrics.json").write_text(json.dumps({"name": name, "note": note, "best_mode": mode}))
    metadata = {"mode": mode, SIGNATURE: keys_of(store).sign_folder(work)} if name == "release" else {}
    return store.put(name, work, parents=parents, metadata=metadata)


def prove(
    store: DvcStore,
    ref: ArtifactRef,
    *,
    failing: str = "",
    lacking: str = "",
    gates: list[Gate] | None = None,
    thresholds: GateConfig = SHIPPED,
) -> ArtifactRef:
    measured = [Gate(name, 1.0, 0.5, name != failing, "d") for name in REQUIRED_GATES[ref.name] if name != lacking]
    return record_evidence(
        store,
        keys_of(store),
        ref,
        gates or measured,
        thresholds,
        code_version="5c",
        not_verified=[],
        run_id="run",
        tmp=store.root.parent,
    )


def release_of(store: DvcStore, work: Path, refs: Refs, *, note: str, mode: str = "ema", leave_out: str = "") -> ArtifactRef:
    parents = [refs[f"policy-{mode}"], *(refs[name] for name in ("evaluation", "onnx", "engine") if name != leave_out)]
    return put(store, work, "release", parents, mode=mode, note=note)


PARENTS: dict[str, list[str]] = {
    "source_images": [],
    "curated_dataset": ["source_images"],
    "candidates": ["curated_dataset"],
    "preference_pairs": ["curated_dataset", "candidates"],
    "reward_model": ["curated_dataset", "candidates", "preference_pairs"],
    "policy-static": ["curated_dataset", "reward_model"],
    "policy-ema": ["curated_dataset", "reward_model"],
    "evaluation": ["curated_dataset", "candidates", "preference_pairs", "reward_model", "policy-static", "policy-ema"],
    "onnx": ["policy-static", "policy-ema", "evaluation"],
    "engine": ["onnx"],
}


def chain_of(store: DvcStore, work: Path, *, given: Refs | None = None, note: str = "", rival: ArtifactRef | None = None) -> Refs:
    """A chain from sources to engine, on top of what is given, every gate proven but the static policy's, whose mode was not chosen.

    Its evaluation compares it with `rival`, a release.
    """
    refs = dict(given or {})
    for name, above in PARENTS.items():
        if name not in refs:
            met = [rival] if rival and name == "evaluation" else []
            refs[name] = put(store, work, name, [*(refs[parent] for parent in above), *met], note=note)
            if name in REQUIRED_GATES:
                prove(store, refs[name], failing="policy_preserved" if name == "policy-static" else "")
    return refs


def approved(
    store: DvcStore, ref: ArtifactRef, *, licence: str = "", parity: Path | None = None, overrides: tuple[str, ...] = ()
) -> Approval:
    by = {"approver": "lee", "reason": "seen by eye"}
    return approve(store, keys_of(store), ref, **by, licence=licence, parity=parity, overrides=overrides, tmp=store.root.parent)
