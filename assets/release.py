"""Stage 11: the better policy as a release, and its way to production."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from assets.common import Made, Work, stage
from assets.promotion import PRODUCTION, promote
from assets.rounds import rounds
from assets.winner import winner
from infra.stores.base import ArtifactRef, StageMove
from models.errors import StoreError
from ops.announce import write_pointer
from ops.approval import approval_for
from ops.gate import evidence_for, verified
from ops.lineage import parent, released_policy
from ops.promote import STAGES
from ops.release import ReleaseConfig, assemble_release

BESIDE_POLICY = ("evaluation", "onnx", "engine")


def _in_production(work: Work) -> ArtifactRef | None:
    """The production release, where it is what would be made now: the winning policy with this proof and these exports."""
    ref = work.pin(PRODUCTION)
    if ref is None or released_policy(work.store, ref) != work.refs[winner(work)].digest:
        return None
    held = {name: parent(work.store, ref, name) for name in BESIDE_POLICY}
    if any(each is None or each.digest != work.refs[name].digest for name, each in held.items()):
        return None
    try:
        verified(work.store, work.workspace.keys, ref)
    except StoreError:  # signed by a key that is no longer trusted, or damaged: it is made again
        return None
    recorded, wanted = work.store.version(ref.digest).config, work.config.model_dump(mode="json")
    return ref if {name: recorded.get(name) for name in wanted} == wanted else None


def _taken_back(work: Work, ref: ArtifactRef) -> StageMove | None:
    """The move that took this release out of production, or the rollback that took its policy out in another release.

    A run with unchanged inputs would put it back; that is for a person to say.
    """
    moves = work.store.moves(ref.name, PRODUCTION)
    policies = [released_policy(work.store, work.store.version(move.digest).ref) for move in moves]
    if own := [at for at, move in enumerate(moves) if move.digest == ref.digest]:
        return moves[own[-1] + 1] if own[-1] + 1 < len(moves) else None
    # After a rollback the policy is evaluated against another production, which gives another release of the same policy.
    same = [at for at, policy in enumerate(policies) if policy == released_policy(work.store, ref)]
    if not same or same[-1] + 1 == len(moves):
        return None
    following = moves[same[-1] + 1]
    return following if following.digest in {move.digest for move in moves[: same[-1]]} else None


def _not_by_itself(work: Work, ref: ArtifactRef, standing: ArtifactRef | None) -> str:
    """Why no preset puts this release into production, or ""."""
    if move := _taken_back(work, ref):
        return f"{move.approver} took what it holds out of production for release v{move.version} ({move.reason})"
    if standing is None:
        return ""
    held, earlier = released_policy(work.store, ref), rounds(work.store, standing)[1:]
    if held not in {released_policy(work.store, each) for each in earlier}:
        return ""
    later = work.store.version(standing.digest)
    return f"release v{later.number}, in production, went on from what it holds, and `onereward run --next-round` goes on from there"


def _promote(work: Work, made: Made) -> dict[str, Any]:
    """Every preset makes a candidate; one with `auto_promote` goes on to production, one with `require_approval` to staging and no
    further. Each move re-reads all evidence.

    What was taken out of production does not return by itself, nor does an earlier round in the place of one that went on from it:
    no stage moves then.
    """
    ref, number = made.version.ref, made.version.number
    standing = work.store.stage(ref.name, PRODUCTION)
    if standing is not None and standing.digest == ref.digest:
        write_pointer(work.store, work.workspace.home)  # an earlier run may have been killed between the move and the file
        return {"ending": "unchanged", "message": f"release v{number} ({ref.digest[:8]}) is production already"}
    settings = work.settings
    reach = STAGES[:2] if settings.require_approval else STAGES if settings.auto_promote else STAGES[:1]
    if reach == STAGES and (why := _not_by_itself(work, ref, standing)):
        by_hand = f"`onereward promote {ref.digest[:12]} {PRODUCTION} --approver <name> --reason <why>`"
        return {"ending": "refused", "message": f"release v{number} ({ref.digest[:8]}): {why}; a person puts it back with {by_hand}"}
    by = {"approver": f"preset {settings.preset}", "reason": f"every gate passed in run {work.run_id}"}
    for name in reach:
        promote(settings, work.workspace, ref, name, **by, warn=work.progress.say)
        work.progress.say(f"release v{number} ({ref.digest[:8]}) is {name}")
    if reach == STAGES:
        approval = approval_for(work.store, work.workspace.keys, ref)
        return {
            "ending": "promoted",
            "message": f"release v{number} ({ref.digest[:8]}) is production" + (f"; {approval}" if approval else ""),
        }
    following = STAGES[len(reach)]
    said = f"release v{number} is in {reach[-1]}; `onereward promote {ref.digest[:12]} {following}` is a person's to say"
    asked = f", after `onereward approve {ref.digest[:12]}`" if settings.require_approval else ""
    return {"ending": "released", "message": said + asked}


def _lineage(work: Work) -> list[ArtifactRef]:
    """Everything the release is made from, children before parents, each once."""
    found: dict[str, ArtifactRef] = {}
    for name in (winner(work), *BESIDE_POLICY):
        for version in work.store.lineage(work.refs[name].digest):
            found.setdefault(version.ref.digest, version.ref)
    return list(found.values())


def _proof(work: Work) -> dict[str, str]:
    """The card lists the lineage and its gates: a version whose evidence was recorded anew makes another card."""
    reports = {ref: evidence_for(work.store, work.workspace.keys, ref) for ref in _lineage(work)}
    lines = [f"{ref.name} {ref.digest} {report.ref.digest if report else ''}" for ref, report in reports.items()]
    # A release signed by a key that was given up is made again.
    return {"key": work.workspace.keys.fingerprint, "proof": "\n".join(lines)}


def _gates(work: Work, lineage: Iterable[ArtifactRef]) -> list[dict[str, Any]]:
    """What was checked on the way, from the stored evidence."""
    reports = [evidence_for(work.store, work.workspace.keys, ref) for ref in lineage]
    return [{"artifact": report.name, **asdict(gate)} for report in reports if report for gate in report.gates]


@stage(
    config=ReleaseConfig,
    parents=("policy", *BESIDE_POLICY),
    group="export",
    kinds={"huggingface"},
    models=("flux",),
    depends=_proof,
    standing=_in_production,
    finish=_promote,
    signed=True,
)
def release(work: Work) -> dict[str, Any]:
    """Diffusers folder, ONNX, engine and model card with the whole lineage; promoted only on every gate's evidence for these digests."""
    inputs, lineage = work.inputs, _lineage(work)
    return assemble_release(
        work.config,
        work.flux,
        inputs[winner(work)],
        inputs["onnx"],
        inputs["engine"],
        inputs["evaluation"],
        work.out,
        work.progress,
        lineage=[{"name": ref.name, "digest": ref.digest} for ref in lineage],
        gates=_gates(work, lineage),
    )
