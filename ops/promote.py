"""Promotion: the only way a stage pointer moves, forward on evidence, back to where it was.

    promote(store, keys, release, "staging", thresholds=GateConfig(), terms=Terms(), approver="kim", reason="better on every task")
    rollback(store, keys, "release", "production", approver="kim", reason="complaints about extend")

Checks that block a Dagster run stop that run alone. Promotion therefore trusts no run: it walks the lineage, reads for every
gated version the evidence recorded for exactly that digest, verifies every byte and every signature, and refuses on anything
that is missing. There is no way to force it. A gate that said no is passed over only where a signed approval of this release
(ops/approval.py) names that gate and says why.

The thresholds in force are those of the preset under which the promotion is made, not of the run that measured: evidence
recorded under laxer ones is refused by name. Whoever runs and promotes under one lax preset has chosen so; the evidence, the
report and the release's card show every threshold. An earlier release that this one was made with or measured against was
promoted under the thresholds of its time, and is not held against today's.
"""

from __future__ import annotations

from collections.abc import Sequence

from infra.signing import Keys
from infra.stores.base import ArtifactRef, ArtifactStore, StageMove, Version
from models.errors import ConfigError, GateRefused, StoreError, UnknownVersion
from ops.approval import Approval, Terms, approval_for, check_terms
from ops.audit import append
from ops.folders import read_metrics
from ops.gate import NEWER_GATES, REQUIRED_GATES, Evidence, GateConfig, evidence_for, verified
from ops.lineage import POLICY_PREFIX, RELEASE, parent, released_policy

STAGES = ("candidate", "staging", "production")
# Allowed moves: from the stage where a release stands now, to the next. None: from nowhere. The way back is `rollback`.
MOVES: tuple[tuple[str | None, str], ...] = ((None, "candidate"), ("candidate", "staging"), ("staging", "production"))
RIVAL_GATE = "evaluation/not_below_production"  # what a release that never met the production that stands has not passed
# What is made with both policies in hand although only one goes on; the other one's health is then no matter.
AFTER_POLICY = ("evaluation", "onnx", "engine", RELEASE)
# What all members of a release share. Two curated versions may split differently: one tests on what the other trained on.
ONE_VERSION = ("curated_dataset", "candidates", "preference_pairs", "reward_model")


def promote(
    store: ArtifactStore,
    keys: Keys,
    ref: ArtifactRef,
    stage: str,
    *,
    thresholds: GateConfig,
    terms: Terms,
    approver: str,
    reason: str,
) -> StageMove:
    """Point `stage` at a release when all evidence for it passes under `thresholds`; a no-op when it points there already.

    Raises GateRefused naming the artifact and the gate, or what the preset's terms still ask for, or the stage it must be in first;
    ConfigError for what is no release, an unknown stage or an empty approver or reason; UnknownVersion for a version the store does
    not hold; StoreError when somebody else moved the stage meanwhile; AuditBroken. The stage has then not moved.
    """
    _check_words(stage, approver, reason)
    if ref.name != RELEASE:
        raise ConfigError(f"{ref.name} {ref.digest[:12]} is no release.", "Promote a release: `onereward versions release` lists them.")
    moves = store.moves(ref.name)
    if (current := _last(moves, stage)) and current.digest == ref.digest:
        return current

    def allowed(moves: Sequence[StageMove]) -> None:
        if _last(moves, stage) != current:
            raise StoreError(f"Somebody else moved {stage} of {ref.name} meanwhile.", "Look at `onereward audit`, then say it again.")
        _check_move(moves, ref, stage)

    allowed(moves)
    evidence = verify(store, keys, ref, thresholds)
    approval = approval_for(store, keys, ref)
    if stage == STAGES[-1]:
        check_terms(terms, ref, evidence, approval)
        if current is not None and RIVAL_GATE not in (approval.overrides if approval else ()):
            _check_rival(store, ref, current)
    proof = [*(each.ref.digest for each in evidence), *([approval.ref.digest] if approval else [])]
    return append(store, keys, ref, stage, approver=approver, reason=reason, evidence=proof, allowed=allowed)


def rollback(store: ArtifactStore, keys: Keys, name: str, stage: str, *, approver: str, reason: str) -> StageMove:
    """Move a stage back to the version it held before the present one, as a new move. Repeated, it goes further back.

    The version was promoted on evidence once, and is not judged again; its bytes and its signature are verified. Raises
    UnknownVersion when there is nothing to go back to, DigestMismatch or SignatureRefused when that version is damaged, StoreError
    when somebody else moved the stage meanwhile.
    """
    _check_words(stage, approver, reason)
    target = _before(store.moves(name, stage), name, stage)
    version = next((v for v in store.versions(name) if v.ref.digest == target.digest), None)
    if version is None:
        raise UnknownVersion(f"The store no longer holds {name} {target.digest[:12]}.", "Restore the registry from a backup.")
    verified(store, keys, version.ref)

    def unchanged(moves: Sequence[StageMove]) -> None:
        if _before([move for move in moves if move.stage == stage], name, stage) != target:
            raise StoreError(f"Somebody else moved {stage} of {name} meanwhile.", "Look at `onereward audit`, then say it again.")

    return append(store, keys, version.ref, stage, approver=approver, reason=reason, evidence=target.evidence, allowed=unchanged)


def _before(moves: Sequence[StageMove], name: str, stage: str) -> StageMove:
    """The move a rollback of a stage returns to. Raises UnknownVersion where there is none. `moves` are those of the stage."""
    held: list[StageMove] = []
    for move in moves:
        # A move to a version that is still underneath is a way back: what was above it has been left for good.
        at = next((i for i, earlier in enumerate(held) if earlier.digest == move.digest), len(held))
        held[at:] = [move]
    if len(held) < 2:
        raise UnknownVersion(f"{name} has no earlier version in {stage}.", "Promote another version instead: `onereward promote`.")
    return held[-2]


def _check_move(moves: Sequence[StageMove], ref: ArtifactRef, stage: str) -> None:
    """Raises GateRefused unless MOVES has a way to `stage` from where the release stands now."""
    sources = [source for source, target in MOVES if target == stage]
    standing = {source for source in sources if source is None or ((last := _last(moves, source)) and last.digest == ref.digest)}
    if not standing:
        needed = " or ".join(str(source) for source in sources)
        remedy = f"Move it there first: `onereward promote {ref.digest[:12]} {sources[0]}`."
        raise GateRefused(f"Release {ref.digest[:12]} is not in {needed}, from where {stage} is reached.", remedy)


def _check_rival(store: ArtifactStore, ref: ArtifactRef, standing: StageMove) -> None:
    """Raises GateRefused unless the release has met the policy that stands in production.

    Evidence of "not below production" is about the production of its time: of two releases that were measured against the same one,
    the second would otherwise replace the first without ever having met it. Its own policy, or that of a rival of its evaluation, it
    has met. So it has the other mode of its evaluation, which was measured against the same base from the same noise, where that
    evaluation is newer than the one that chose what stands.
    """
    evaluation, standing_ref = parent(store, ref, "evaluation"), store.version(standing.digest).ref
    made_from = store.version(evaluation.digest).parents if evaluation else ()
    rivals = [each for each in made_from if each.name == RELEASE]
    met_policies = {released_policy(store, each) for each in (ref, *rivals)}
    before = parent(store, standing_ref, "evaluation")
    if evaluation and before and store.version(before.digest).created < store.version(evaluation.digest).created:
        met_policies |= {each.digest for each in made_from if each.name.startswith(POLICY_PREFIX)}
    if released_policy(store, standing_ref) in met_policies - {None}:
        return
    met = " and ".join(sorted(each.digest[:12] for each in rivals)) or "none"
    raise GateRefused(
        f"Release {ref.digest[:12]} was measured against another production ({met}) than {standing.digest[:12]}, which stands.",
        f"Run the chain again, so that it meets that one; or `onereward approve` it with an override of {RIVAL_GATE}, and say why.",
    )


def _last(moves: Sequence[StageMove], stage: str) -> StageMove | None:
    return next((move for move in reversed(moves) if move.stage == stage), None)


def verify(store: ArtifactStore, keys: Keys, ref: ArtifactRef, thresholds: GateConfig | None) -> list[Evidence]:
    """All evidence a promotion of the release `ref` rests on, in the chain's order, after verifying it and every byte of the lineage.

    Without `thresholds` the evidence is held against those it was recorded under. Raises GateRefused for a release that is not
    signed, and for the first gate, in the chain's order, whose evidence is missing, altered, not signed, about another version,
    recorded under laxer thresholds, or says no.
    """
    members = members_of(store, ref)
    gated = sorted({v.ref for v, _ in members if v.ref.name in REQUIRED_GATES}, key=lambda each: list(REQUIRED_GATES).index(each.name))
    own = {version.ref for version, release in members if release.ref == ref}
    approvals = {release.ref: approval_for(store, keys, release.ref) for _, release in members}
    reached = {version.ref: approvals[release.ref] for version, release in members}
    evidence = [_passed(store, keys, each, thresholds if each in own else None, reached[each]) for each in gated]
    for version, release in members:
        try:
            if version is release:
                verified(store, keys, version.ref)
                _check_release(store, version, [v for v, r in members if r is release])
            store.get(version.ref)
        except StoreError as error:
            raise GateRefused(f"{version.ref.name} {version.ref.digest[:12]} is damaged: {error.what}", error.remedy) from error
    return evidence


def members_of(store: ArtifactStore, ref: ArtifactRef) -> list[tuple[Version, Version]]:
    """The versions that count for a release's promotion, each with the release it was reached through: a release made with the help
    of an earlier one rests on that one's evidence too, under that one's mode."""
    lineage = store.lineage(ref.digest)
    known = {(v.ref.name, v.ref.digest): v for v in reversed(lineage)}
    if (ref.name, ref.digest) not in known:
        raise UnknownVersion(f"The store holds no {ref.name} with digest {ref.digest[:12]}.", "`onereward versions` lists what it holds.")
    found: dict[tuple[str, str, str], tuple[Version, Version]] = {}
    open_ = [(known[ref.name, ref.digest], known[ref.name, ref.digest])]
    while open_:
        version, release = open_.pop()
        release = version if version.ref.name == RELEASE else release
        place = (version.ref.name, version.ref.digest, release.ref.digest)
        if place in found:
            continue
        found[place] = (version, release)
        other_modes = {name for name in REQUIRED_GATES if name.startswith(POLICY_PREFIX)} - set(_wanted(release))
        left_out = other_modes if version.ref.name in AFTER_POLICY else set()
        open_ += [(known[parent.name, parent.digest], release) for parent in version.parents if parent.name not in left_out]
    return list(found.values())


def _wanted(release: Version) -> tuple[str, ...]:
    """The artifacts whose evidence a release needs: all gated ones, of the policies the released one."""
    chosen = f"{POLICY_PREFIX}{release.metadata.get('mode')}"
    if chosen not in REQUIRED_GATES:
        raise GateRefused(f"Release {release.ref.digest[:12]} does not say which policy it holds.", "Make the release again.")
    return tuple(name for name in REQUIRED_GATES if not name.startswith(POLICY_PREFIX) or name == chosen)


def _passed(store: ArtifactStore, keys: Keys, ref: ArtifactRef, thresholds: GateConfig | None, approval: Approval | None) -> Evidence:
    """The evidence for a version. Raises GateRefused unless every required gate is in it and all passed, under no laxer thresholds.

    A gate that did not pass is passed over where the release's approval overrides it by name.
    """
    subject, remedy = f"{ref.name} {ref.digest[:12]}", f"Materialize {ref.name} with its checks again."
    try:
        evidence = evidence_for(store, keys, ref)
    except StoreError as error:
        raise GateRefused(f"The gate evidence for {subject} is damaged: {error.what}", remedy) from error
    first = REQUIRED_GATES[ref.name][0]
    if evidence is None:
        raise GateRefused(f"There is no evidence for {subject}: gate {first} was never measured for this digest.", remedy)
    # Without thresholds it is an earlier release's, or is verified as it stands: the newer gates may not have been there in its time.
    if missing := [name for name in evidence.missing if thresholds or name not in NEWER_GATES]:
        raise GateRefused(f"The evidence for {subject} lacks the gate {missing[0]}.", remedy)
    for gate in evidence.gates:
        overridden = approval is not None and f"{ref.name}/{gate.name}" in approval.overrides
        if (gate.passed is not True or gate.measure is None) and not overridden:
            raise GateRefused(f"{subject} did not pass {gate}.", "See the report for why; nothing was promoted.")
    if lax := evidence.laxer_than(thresholds) if thresholds else []:
        what = f"The evidence for {subject} was recorded under {', '.join(lax)}."
        raise GateRefused(what, f"Run the check of {ref.name} again under the thresholds in force.")
    return evidence


def _check_release(store: ArtifactStore, release: Version, members: list[Version]) -> None:
    """A release rests on every gated stage and on one version of the data and the judge, and what was evaluated and exported is
    the policy it holds. `members` are the release's own lineage, without that of an earlier release it was made with."""
    digests: dict[str, set[str]] = {}
    for version in members:
        digests.setdefault(version.ref.name, set()).add(version.ref.digest)
    for needed in dict.fromkeys((*ONE_VERSION, *_wanted(release))):
        if needed not in digests:
            raise GateRefused(f"Release {release.ref.digest[:12]} was not made from any {needed}.", "Make the release by the whole chain.")
    for name in ONE_VERSION:
        if len(digests[name]) != 1:
            shown = " and ".join(digest[:12] for digest in sorted(digests[name]))
            what = f"Release {release.ref.digest[:12]} mixes {len(digests[name])} versions of {name}: {shown}."
            raise GateRefused(what, f"Run the chain from {name} on, so that everything below is made from one version.")
    mode = release.metadata["mode"]
    policy = POLICY_PREFIX + mode
    held = {parent.digest for v in members if v.ref.name in AFTER_POLICY for parent in v.parents if parent.name == policy}
    if len(held) != 1:
        raise GateRefused(f"Release {release.ref.digest[:12]} mixes {len(held)} versions of {policy}.", "Make evaluation to release again.")
    for version in members:
        if version.ref.name == "evaluation" and (best := read_metrics(store.get(version.ref)).get("best_mode")) != mode:
            what = f"Release {release.ref.digest[:12]} holds {policy}, but its evaluation is about {POLICY_PREFIX}{best}."
            raise GateRefused(what, "Make the release again.")


def _check_words(stage: str, approver: str, reason: str) -> None:
    if stage not in STAGES:
        raise ConfigError(f"There is no stage {stage!r}.", f"Stages are {', '.join(STAGES)}.")
    if not approver.strip() or not reason.strip():
        raise ConfigError("A stage moves only with an approver and a reason.", "Name both.")
