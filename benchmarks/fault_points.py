"""Put, promote and rollback on a small registry, kill -9 at any change they make of the file system, and what must hold then.

Every point is a function that ends in (template, scratch folder), breaks something for real on a copy of the template's registry,
in processes of its own, and then looks at it as a newcomer would. It returns what was seen, or raises Lost when any of these does
not hold:

- no half version: after reopening, every listed version's bytes hash to its digest, read from the cache;
- no pointer to missing bytes: every stage points to a listed version;
- the state is that before the operation or that after it, and what a reader saw meanwhile is not taken back;
- where the process lives to say something, it says one of models/errors.py's classes, with a remedy;
- the next operation succeeds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dvc.repo  # noqa: F401  # here and not in each forked process, where it costs a second
import pygit2
import tqdm

from benchmarks.fault_tracer import shown, traced
from infra.signing import Keys
from infra.stores.base import ArtifactRef, directory_digest
from infra.stores.dvc import DvcStore
from models.errors import OneRewardError
from ops.announce import POINTER, write_pointer
from ops.approval import Terms
from ops.gate import REQUIRED_GATES, SIGNATURE, Gate, GateConfig, record_evidence
from ops.lineage import RELEASE
from ops.promote import ONE_VERSION, STAGES, promote, rollback
from ops.verify import verify_lines

POLICY = "policy-ema"
CHAIN = (*ONE_VERSION, POLICY, "evaluation", "onnx", "engine")
RELEASES = ("one", "two", "three")
BY = {"approver": "on call", "reason": "fault matrix"}
WEIGHTS_BYTES = 200_000  # of a release and of the version that is put; ours
SMALL_BYTES = 5000  # of everything else; ours
State = tuple[frozenset[tuple[str, int, str]], frozenset[tuple[str, str, int, str]]]

tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose


class Lost(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Seen:
    """What one point showed."""

    done: str
    state: str
    error: str = ""


# The registries that every point copies


def build(template: Path) -> None:
    """Two homes and a folder that is to be put.

    `chain/`: one chain with its evidence and three releases, two of which have been in production and the third is in staging.
    `short/`: two versions. `new/`: what is to be put.
    """
    store, keys = DvcStore(template / "chain" / "registry"), Keys(template / "chain" / "keys")
    parents: list[ArtifactRef] = []
    for name in CHAIN:
        ref = store.put(name, fill(template / "work", name), parents=parents)
        policy = [each for each in parents if each.name == POLICY]
        parents = [*policy, ref]
        if gates := REQUIRED_GATES.get(name):
            measured = [Gate(gate, 1.0, 0.5, True, "") for gate in gates]
            record_evidence(store, keys, ref, measured, GateConfig(), code_version="", not_verified=[], run_id="", tmp=template)
    for note in RELEASES:
        folder = fill(template / "work", note)
        ref = store.put(RELEASE, folder, parents=parents, metadata={"mode": "ema", SIGNATURE: keys.sign_folder(folder)})
        for stage in STAGES[: 2 if note == RELEASES[-1] else 3]:
            promote(store, keys, ref, stage, thresholds=GateConfig(), terms=Terms(), **BY)
    write_pointer(store, template / "chain")
    short = DvcStore(template / "short" / "registry")
    above = short.put("reward_model", fill(template / "work", "reward_model"))
    short.put(POLICY, fill(template / "work", POLICY), parents=[above])
    fill(template / "new", "new")


def fill(folder: Path, note: str) -> Path:
    """An artifact's folder anew, its bytes made from `note`; one file is the same in all."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"note": note, "best_mode": "ema"}))
    size = WEIGHTS_BYTES if note in (*RELEASES, "new") else SMALL_BYTES
    (folder / "model" / "weights").write_bytes((note.encode() * size)[:size])
    (folder / "model" / "shared").write_bytes(b"in every version" * 100)
    return folder


def copied(template: Path, operation: str, folder: Path) -> Path:
    """A home of one's own for an operation; its registry."""
    source = template / ("short" if operation == "put" else "chain")
    return Path(shutil.copytree(source, folder / "home", symlinks=True)) / "registry"


# The operations under test, each on a registry opened anew


def put(template: Path, root: Path) -> None:
    store = DvcStore(root)
    store.put(POLICY, template / "new", parents=[store.versions("reward_model")[-1].ref])


def promote_third(template: Path, root: Path) -> None:
    store, keys = DvcStore(root), Keys(root.parent / "keys")
    promote(store, keys, store.versions(RELEASE)[-1].ref, STAGES[-1], thresholds=GateConfig(), terms=Terms(), **BY)
    write_pointer(store, root.parent)


def roll_back(template: Path, root: Path) -> None:
    store = DvcStore(root)
    rollback(store, Keys(root.parent / "keys"), RELEASE, STAGES[-1], **BY)
    write_pointer(store, root.parent)


OPERATIONS: dict[str, Callable[[Path, Path], None]] = {"put": put, "promote": promote_third, "rollback": roll_back}


# What must hold


def state_of(store: DvcStore) -> State:
    """Everything that is promised to readers, apart from times."""
    versions = store.versions()
    moves = [move for name in sorted({v.ref.name for v in versions}) for move in store.moves(name)]
    return (
        frozenset((v.ref.name, v.number, v.ref.digest) for v in versions),
        frozenset((m.name, m.stage, m.counter, m.digest) for m in moves),
    )


def inspect(root: Path) -> State:
    """The state of a registry as one finds it who opens it now. Raises Lost for a half version, a lost pointer or leftovers."""
    store = DvcStore(root)
    versions, moves = state_of(store)
    for version in store.versions():
        if directory_digest(store.get(version.ref))[0] != version.ref.digest:
            raise Lost(f"{version.ref.name} {version.number} is not what its digest says")
    held = {(name, digest) for name, _, digest in versions}
    for name, stage in {(name, stage) for name, stage, *_ in moves}:
        pointer = store.stage(name, stage)
        if pointer is None or (name, pointer.digest) not in held:
            raise Lost(f"{stage} of {name} points to no version")
    pointer_file = root.parent / POINTER
    if pointer_file.exists() and (RELEASE, json.loads(pointer_file.read_text())["digest"]) not in held:
        raise Lost(f"{POINTER} names no version")
    if (root / ".pending").exists() or (changed := pygit2.Repository(str(root)).status()):
        raise Lost(f"the registry was left with {changed or '.pending'}")
    return versions, moves


def inspect_cache(root: Path) -> State:
    """As `inspect`, of the bytes in DVC's cache and not of those linked from it before."""
    shutil.rmtree(root / "checkouts", ignore_errors=True)
    return inspect(root)


def told(work: Callable[[], object], *kinds: type[OneRewardError]) -> str:
    """The error with which `work` is refused. Raises Lost when it is none of `kinds`, says no remedy, or does not come."""
    try:
        work()
    except kinds as error:
        if not error.remedy:
            raise Lost(f"no remedy: {error}") from error
        return f"{type(error).__name__}: {error.what}"
    except Exception as error:
        raise Lost(f"instead of {kinds[0].__name__}: {type(error).__name__}: {error}") from error
    raise Lost(f"no {kinds[0].__name__} was shown")


def result_of(operation: str, template: Path, folder: Path) -> State:
    """The state an operation leads to when nothing stops it."""
    root = copied(template, operation, folder)
    OPERATIONS[operation](template, root)
    return inspect(root)


def goes_on(operation: str, template: Path, root: Path, before: State, after: State) -> str:
    """Which of the two states the registry is in; the next operation succeeds there, and then everything verifies."""
    state = inspect_cache(root)
    if state not in (before, after):
        raise Lost(f"a state that is neither: {[sorted(now ^ then) for now, then in zip(state, before, strict=True)]}")
    if state == before or operation == "put":
        OPERATIONS[operation](template, root)
    else:
        put(template, root)
        write_pointer(DvcStore(root), root.parent)  # what saying the promotion once more does
    then = inspect(root)
    if state == before and then != after:
        raise Lost("the operation, repeated, does not lead to its result")
    if operation != "put":
        list(verify_lines(DvcStore(root), Keys(root.parent / "keys"), root.parent))  # `onereward verify`
    return "before" if state == before else "after"


# Kill -9


def changes_of(operation: str, template: Path, folder: Path) -> int:
    """How many changes of the file system an operation makes when nothing stops it."""
    end = traced(partial(OPERATIONS[operation], template, copied(template, operation, folder)))
    if end.code:
        raise Lost(f"{operation} fails without any fault")
    return len(end.changes)


def kill(operation: str, at: int, after: State, template: Path, folder: Path) -> Seen:
    """Kill an operation before its change number `at`, or before its last one where this run makes fewer."""
    root = copied(template, operation, folder)
    reader = DvcStore(root)  # opened before the writer starts, and not opened again
    before = state_of(reader)
    end = traced(partial(OPERATIONS[operation], template, root), at)
    if not end.killed:
        shutil.rmtree(root.parent)
        return kill(operation, len(end.changes), after, template, folder)
    seen = state_of(reader)
    found = state_of(DvcStore(root))
    if not (seen[0] <= found[0] and seen[1] <= found[1]):
        raise Lost("a reader saw what was taken back")
    return Seen(f"kill -9 before {shown(end.changes[-1])}", goes_on(operation, template, root, before, after), "(killed)")
