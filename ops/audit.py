"""The audit log: every stage move, approval and note as one chain of signed entries.

    entry = append(store, keys, ref, "production", approver="kim", reason="better on every task", evidence=[...])
    verify_chain("release", store.moves("release"), keys)

An entry is a `StageMove`: who, when, from what (the move before it in its stage), to what, why, and the digests of its evidence.
It holds the SHA-256 of the entry before it and a signature over itself, so that an entry that is edited, removed or put
elsewhere breaks the chain. Taking away the newest entries would leave a shorter chain that holds: the signed head, kept with
the keys and not in the store, says how far the log went. A head that lags behind (its writer was killed) is no harm, since
what follows it is signed; the next entry brings it up to date.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import filelock

from infra.disk import replacing, writing
from infra.signing import Keys
from infra.stores.base import NOTES, ArtifactRef, ArtifactStore, StageMove
from models.errors import AuditBroken, OneRewardError, StoreError

APPROVED, ROTATED, UNDELIVERED = NOTES
REMEDY = "Nothing is moved on a broken log: restore the store's tags from a backup (docs/promotion.md)."


def append(
    store: ArtifactStore,
    keys: Keys,
    ref: ArtifactRef,
    stage: str,
    *,
    approver: str,
    reason: str,
    evidence: Sequence[str] = (),
    allowed: Callable[[Sequence[StageMove]], None] = lambda moves: None,
) -> StageMove:
    """Add an entry and move the stage. `allowed` is asked with the log so far, while nobody else can move, and raises to refuse.

    Raises AuditBroken where the log does not hold, SignatureRefused where the home may not sign: nothing has moved then. Raises
    StoreError saying so where the stage moved and the head could not be written.
    """

    def seal(moves: Sequence[StageMove], move: StageMove) -> StageMove:
        verify_chain(ref.name, moves, keys)
        allowed(moves)
        linked = dataclasses.replace(move, previous=entry_digest(moves[-1]) if moves else "")
        return dataclasses.replace(linked, signature=keys.sign(_text(linked)))

    move = store.assign(ref, stage, approver=approver, reason=reason, evidence=evidence, seal=seal)
    try:
        _keep_head(move, keys)
    except OneRewardError as error:
        told = f"{stage} of {ref.name} has moved to v{move.version}, but the head of the audit log was not written: {error.what}"
        raise StoreError(told, "The next entry writes it. Do not repeat a rollback: it would go further back.") from error
    return move


def entry_digest(move: StageMove) -> str:
    """SHA-256 (hex) of an entry with its signature: what the next one holds as `previous`."""
    return hashlib.sha256(_json(dataclasses.asdict(move))).hexdigest()


def verify_chain(name: str, moves: Sequence[StageMove], keys: Keys) -> None:
    """Raises AuditBroken naming the first entry of a name's log that does not hold. `moves` are all of them, oldest first."""
    broken = _first_unlinked(moves)
    if broken is None and moves and not keys.signed(_text(moves[-1]), moves[-1].signature):
        broken = len(moves), "is not signed by a trusted key, or was altered"
    if broken:
        # Links tell where the chain tears; an entry's own signature tells which one was touched.
        upto = moves[: broken[0]]
        altered = next((i for i, move in enumerate(upto, 1) if move.counter == i and not keys.signed(_text(move), move.signature)), None)
        number, how = (altered, "was altered, or is not signed by a trusted key") if altered else broken
        raise AuditBroken(f"Entry {number} of the audit log of {name} {how}.", REMEDY)
    head = _head(name, keys)
    if head is None and len(moves) > 1:
        raise AuditBroken(f"{keys.folder} holds no head of the audit log of {name}: its newest entries could be missing.", REMEDY)
    if head is None:
        return
    number, digest = head
    if len(moves) < number:
        raise AuditBroken(f"Entry {len(moves) + 1} of the audit log of {name} was removed: the log went to entry {number}.", REMEDY)
    if entry_digest(moves[number - 1]) != digest:
        raise AuditBroken(f"Entry {number} of the audit log of {name} is not the one that the signed head names.", REMEDY)


def _first_unlinked(moves: Sequence[StageMove]) -> tuple[int, str] | None:
    previous = ""
    for number, move in enumerate(moves, 1):
        if move.counter != number:
            return number, "is missing"
        if move.previous != previous:
            return number, "does not follow the one before it: one of the two was replaced"
        previous = entry_digest(move)
    return None


def _keep_head(move: StageMove, keys: Keys) -> None:
    """Write the signed head, unless another process wrote a later one."""
    said = {"name": move.name, "counter": move.counter, "entry": entry_digest(move)}
    signed = {**said, "signature": keys.sign(_json(said))}
    path = keys.folder / f"head-{move.name}.json"
    with filelock.FileLock(keys.folder / ".lock"):
        head = _head(move.name, keys)
        if head is None or head[0] < move.counter:
            with writing(path), replacing(path) as draft:
                draft.write_text(json.dumps(signed, indent=2) + "\n")


def _head(name: str, keys: Keys) -> tuple[int, str] | None:
    """Number and digest of the newest entry this home knows of. Raises AuditBroken for a head that is not signed."""
    path = keys.folder / f"head-{name}.json"
    try:
        said = json.loads(path.read_text())
        signature = said.pop("signature")
        trusted = said["name"] == name and keys.signed(_json(said), signature)
        newest = said["counter"], said["entry"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        trusted = False  # what cannot be read, was cut or was edited vouches for nothing
    if not trusted:
        raise AuditBroken(f"The head {path} is not signed by a trusted key.", REMEDY)
    return newest


def _text(move: StageMove) -> bytes:
    """What an entry's signature is over: all of it but the signature."""
    fields = dataclasses.asdict(move)
    del fields["signature"]
    return _json(fields)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
