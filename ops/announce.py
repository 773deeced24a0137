"""What the world outside learns of production: a pointer file in the home, and a signed web request.

    announce(store, keys, home, webhook="https://deploy.example/onereward", warn=print)

`production.json` is replaced whole, so a deployment that reads it sees the old release or the new one. The web request carries
the same JSON; its header X-OneReward-Signature is `sha256=` and the HMAC-SHA256 of the body under the secret that both sides
hold (ONEREWARD_WEBHOOK_SECRET, never in a file). A receiver that does not answer changes nothing about the promotion: there is
one warning, and an entry `undelivered` in the audit log.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock

from infra.disk import replacing, writing
from infra.signing import Keys
from infra.stores.base import ArtifactStore, StageMove
from models.errors import OneRewardError
from ops.audit import UNDELIVERED, append, entry_digest
from ops.lineage import RELEASE
from ops.promote import STAGES

POINTER = "production.json"
SECRET_VARIABLE = "ONEREWARD_WEBHOOK_SECRET"
HEADER = "X-OneReward-Signature"
ATTEMPTS, TIMEOUT_S, BACKOFF_S = 3, 5.0, 0.5  # ours; the pause doubles


def announce(store: ArtifactStore, keys: Keys, home: Path, *, webhook: str | None, warn: Callable[[str], None]) -> None:
    """Write the pointer to what production is now, and tell the webhook. Raises DiskFull or ConfigError for the file alone."""
    pointer = write_pointer(store, home)
    if webhook and pointer and (trouble := _post(webhook, json.dumps(pointer, sort_keys=True).encode())):
        parts = urlsplit(webhook)
        told = f"the webhook at {parts.scheme}://{parts.hostname} was not told: {trouble}"  # a path or a query may hold a token
        warn(f"warning: {told}; production has moved all the same")
        try:
            ref = store.version(pointer["digest"]).ref
            append(store, keys, ref, UNDELIVERED, approver="webhook", reason=told)
        except OneRewardError as error:
            warn(f"warning: the audit log has no note of it: {error.what}")


def write_pointer(store: ArtifactStore, home: Path) -> dict[str, Any] | None:
    """Make `<home>/production.json` say what production is now; its content, or None where no release ever was."""
    path = home / POINTER
    with writing(path), filelock.FileLock(home / ".production.lock"):  # so that the later of two writers reads the later state
        moves = store.moves(RELEASE, STAGES[-1])
        if not moves:
            return None
        pointer = pointer_of(store, moves[-1])
        with replacing(path) as draft:
            draft.write_text(json.dumps(pointer, indent=2) + "\n")
    return pointer


def pointer_of(store: ArtifactStore, move: StageMove) -> dict[str, Any]:
    """What the pointer file says of a move."""
    return {
        "name": move.name,
        "version": move.version,
        "digest": move.digest,
        "uri": next(v.ref.uri for v in store.versions(move.name) if v.ref.digest == move.digest),
        "stage": move.stage,
        "counter": move.counter,
        "entry": entry_digest(move),
        "when": move.when,
        "approver": move.approver,
        "reason": move.reason,
        "evidence": list(move.evidence),
    }


def _post(url: str, body: bytes) -> str:
    """Send the body; "" when it was taken, else why not."""
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        return f"{SECRET_VARIABLE} is not set"
    headers = {"Content-Type": "application/json", HEADER: f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"}
    trouble = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            trouble = f"it answered {error.code}"
        except (OSError, HTTPException) as error:
            trouble = f"{getattr(error, 'reason', None) or type(error).__name__}"
    return f"{trouble}, {ATTEMPTS} times"
