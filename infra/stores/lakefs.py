"""Artifacts in a lakeFS repository, for many users and object storage.

    store = LakeFSStore(open_server("onereward"), home / "lakefs")     # `store: lakefs://onereward` does this
    ref = store.put("curated_dataset", folder, key=key, run_id=run)
    folder = store.get(ref)

In the repository:
    artifacts/<name>/<digest>/...   the files, each with its SHA-256 as metadata
    put-...                         one branch for a `put` under way: uploaded to, committed to, merged into the run's branch, deleted
    run-<id>                        a branch per run, which shows what it made in order
    <name>.v<number>                a version: an immutable tag on the commit that holds its files, and its record as metadata
    <name>.move.<counter>           an entry of the audit log: an immutable tag on a commit of `audit`, the move as that commit's metadata
    main                            protected: it holds the versions that gates passed, and all they were made from
A tag is the last step and is created only if absent, so a version or a move is there whole or not at all, and of two writers one
takes the next number. Gates run after a `put`; so that writes to a run's branch alone. Promotion verifies the evidence and then
calls `assign` with it, which merges into `main` before the stage moves; the server's own hook (infra/deploy/lakefs/evidence.yaml)
refuses a merge that names no evidence. What moves no stage (an approval) has none, and is only logged.
Here on disk: `checkouts/<digest>/`, what `get` hands out, and `commits/<id>.json`, the metadata of commits, which never change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from infra.disk import no_space
from infra.progress import Progress
from infra.stores.base import (
    NOTES,
    ArtifactRef,
    ArtifactStore,
    FileChange,
    GcReport,
    Seal,
    StageMove,
    Version,
    check_name,
    directory_digest,
    file_changes,
    newest,
    refuse_other,
)
from infra.stores.content import FileStat, digest_of, hash_files, in_parallel, metered, walk
from infra.stores.lakefs_server import MAIN, Missing, Server, Taken
from models.errors import DigestMismatch, DiskFull, OneRewardError, StoreError

HOOK = Path(__file__).parents[1] / "deploy" / "lakefs" / "evidence.yaml"
HOOK_PATH = "_lakefs_actions/evidence.yaml"
SETUP = "setup"  # the branch that brings the hook
AUDIT = "audit"
ATTEMPTS = 20  # ours: writers that may be quicker, one after the other, before this one gives up
WORKERS = 8  # ours: records asked for at once
LEFTOVER_S = 24 * 3600.0  # ours: nobody uploads to the branch of a `put` for longer than this without a new object
LOCK_TIMEOUT_S = 3600.0  # ours: longer than fetching a full-size model takes
UPLOAD = re.compile(r"put-([0-9a-f]{8})-[0-9a-f]{8}-([0-9a-f]{16})-(.+)")  # run, key, digest, name
VERSION = re.compile(r"([^.]+)\.v(\d+)")
MOVE = re.compile(r"([^.]+)\.move\.(\d+)")


class LakeFSStore(ArtifactStore):
    """A lakeFS repository with a local folder for what was fetched. The first `put` makes it ready, as `prepare` says."""

    def __init__(self, server: Server, root: Path):
        self.server, self.root = server, root.resolve()
        self._known: dict[str, dict[str, str]] = {}  # commit id -> metadata
        self._ready = False

    def put(
        self,
        name: str,
        folder: Path,
        *,
        key: str = "",
        parents: Sequence[ArtifactRef] = (),
        run_id: str = "",
        code_version: str = "",
        config: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> ArtifactRef:
        """See ArtifactStore. Files that an earlier, cut attempt of the same run uploaded are not sent again."""
        check_name(name)
        with self._errors(f"store {name}"):
            found = walk(folder)
            with metered(progress, f"hash {name}", sum(each.size for each in found.values())) as meter:
                hashes = dict(zip(found, hash_files([folder / path for path in found], meter), strict=True))
            digest = digest_of(hashes.items())
            attempts = ATTEMPTS
            while True:
                stored = self.versions()  # none, while there is no repository
                same = [v for v in stored if (v.ref.name, v.ref.digest, v.key) == (name, digest, key)]
                if same:
                    return same[-1].ref
                for parent in parents:
                    newest(stored, parent.name, parent.digest)
                uri = f"lakefs://{self.server.repository}?name={name}&digest={digest}"
                ref = ArtifactRef(name, digest, uri, sum(each.size for each in found.values()))
                number = 1 + max((v.number for v in stored if v.ref.name == name), default=0)
                version = Version(ref, number, key, tuple(parents), run_id, _now(stored), code_version, config or {}, metadata or {})
                try:
                    if not self._ready:
                        prepare(self.server)
                        self._ready = True
                    self._store(version, folder, found, hashes, progress)
                    return ref
                except (Taken, Missing):  # another writer took the number, or finished the same `put` and deleted its branch
                    attempts -= 1
                    if not attempts:
                        raise

    def _store(self, version: Version, folder: Path, found: dict[str, FileStat], hashes: dict[str, str], progress: Progress | None) -> None:
        name, digest, run = version.ref.name, version.ref.digest, version.run_id
        record = json.dumps(dataclasses.asdict(version), sort_keys=True)
        shown = {"name": name, "digest": digest, "key": version.key, "run": run, "code": version.code_version, "version": record}
        message = f"{name} {version.number}: {digest[:12]}"
        branch, run_branch = f"put-{_short(run)}-{_short(version.key)}-{digest[:16]}-{name}", run_branch_of(run)
        self.server.branch(branch)
        there = self.server.objects(branch, _place(version.ref))
        left = [path for path in found if path not in there or there[path].content != (hashes[path], found[path].size)]
        with metered(progress, f"send {name}", sum(found[path].size for path in left)) as meter:

            def send(path: str) -> None:
                self.server.upload(branch, _place(version.ref) + path, folder / path, hashes[path])
                meter.add(found[path].size)

            in_parallel(send, left, meter)
        if walk(folder) != found:
            raise StoreError(f"{folder} changed while it was stored.", "Let its writer end, then do the same again.")
        commit = self.server.commit(branch, message, shown)
        self.server.branch(run_branch)
        self.server.merge(commit, run_branch, message, shown)
        self.server.tag(f"{name}.v{version.number:06d}", commit)
        self.server.drop(branch)

    def get(self, ref: ArtifactRef, progress: Progress | None = None) -> Path:
        """See ArtifactStore. Files that an earlier, cut attempt fetched are not fetched again."""
        version = self._version(ref.name, ref.digest)
        target = self.root / "checkouts" / ref.digest
        if _intact(target, ref.digest):
            return target
        with self._errors(f"read {ref.name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(target.with_name(f".{ref.digest}.lock"), timeout=LOCK_TIMEOUT_S):
                if not _intact(target, ref.digest):  # another process may have fetched it meanwhile
                    part = target.with_name(f"{ref.digest}.part")
                    self._fetch(version, part, progress)
                    shutil.rmtree(target, ignore_errors=True)
                    part.rename(target)
        return target

    def _fetch(self, version: Version, part: Path, progress: Progress | None) -> None:
        """The version's files, read-only, at `part`, where an earlier attempt may have left some."""
        place, tag = _place(version.ref), _tag(version)
        objects = self.server.objects(tag, place)
        for path in objects:
            if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise _mismatch(version, f"hold a path that leaves its folder, {path!r}")
        for file in [file for file in part.rglob("*") if file.is_file() and file.relative_to(part).as_posix() not in objects]:
            file.unlink()
        try:
            with metered(progress, f"fetch {version.ref.name}", version.ref.size) as meter:

                def receive(path: str) -> str:
                    target = part / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    sha256 = _sha256(target) if target.is_file() else ""
                    if sha256 != objects[path].sha256 or not sha256:
                        self.server.download(tag, place + path, target)
                        sha256 = _sha256(target)
                    target.chmod(0o444)
                    meter.add(objects[path].size)
                    return sha256

                hashes = in_parallel(receive, objects, meter)
            if digest_of(zip(objects, hashes, strict=True)) != version.ref.digest:
                raise _mismatch(version, "do not hash to it")
        except Missing as error:
            shutil.rmtree(part, ignore_errors=True)
            raise _mismatch(version, "are missing on the server") from error
        except DigestMismatch:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def diff(self, a: ArtifactRef, b: ArtifactRef) -> list[FileChange]:
        with self._errors("be read"):
            versions = [self._version(ref.name, ref.digest) for ref in (a, b)]
            old, new = (self.server.objects(_tag(version), _place(version.ref)) for version in versions)
            return file_changes({path: each.content for path, each in old.items()}, {path: each.content for path, each in new.items()})

    def gc(self, dry_run: bool = True, live: Collection[str] = ()) -> GcReport:
        """See ArtifactStore. Removes the branches of cut `put`s; lakeFS then frees their objects by its own retention rules."""
        runs, paths, size = {_short(run) for run in live}, [], 0
        with self._errors("be cleaned"), suppress(Missing):  # a repository that was not made yet has nothing to collect
            for branch in self.server.branches("put-"):
                match = UPLOAD.fullmatch(branch)
                if match is None or match[1] in runs:
                    continue
                objects = self.server.objects(branch, f"artifacts/{match[3]}/{match[2]}")
                if any(time.time() - each.uploaded < LEFTOVER_S for each in objects.values()):
                    continue
                paths.append(branch)
                size += sum(each.size for each in objects.values())
                if not dry_run:
                    self.server.drop(branch)
        return GcReport(tuple(sorted(paths)), size, dry_run)

    def versions(self, name: str | None = None) -> list[Version]:
        with self._errors("be read"):
            tags = self._tags(f"{name}.v" if name is not None else "")
            found = self._commits((match, commit) for tag, commit in tags.items() if (match := VERSION.fullmatch(tag)))
            return sorted((_version(match[1], int(match[2]), said) for match, said in found), key=lambda version: version.created)

    def assign(
        self, ref: ArtifactRef, stage: str, *, approver: str, reason: str, evidence: Sequence[str] = (), seal: Seal | None = None
    ) -> StageMove:
        """See ArtifactStore. With evidence, the version is merged into `main` first. Raises StoreError where the hook refuses that."""
        check_name(stage)
        with self._errors(f"point {stage} at {ref.name}"):
            version = self._version(ref.name, ref.digest)
            attempts = ATTEMPTS
            while True:
                earlier = self.moves(ref.name)
                counter = 1 + max((move.counter for move in earlier), default=0)
                when = datetime.now(UTC).isoformat(timespec="microseconds")
                move = StageMove(ref.name, stage, ref.digest, version.number, counter, when, approver, reason, tuple(evidence))
                move = seal(earlier, move) if seal else move
                self._merge(version, move)
                self.server.branch(AUDIT)
                said = {"stage": stage, "approver": approver, "evidence": ",".join(evidence)}
                said["move"] = json.dumps(dataclasses.asdict(move), sort_keys=True)
                commit = self.server.commit(AUDIT, f"{ref.name} {version.number} -> {stage}: {reason}", said)
                try:
                    self.server.tag(f"{ref.name}.move.{counter:06d}", commit)
                    return move
                except Taken:  # another promoter took the counter
                    attempts -= 1
                    if not attempts:
                        raise

    def _merge(self, version: Version, move: StageMove) -> None:
        """Bring a version into `main` on its evidence, after what it was made from; what is there already stays."""
        evidence = {"evidence": ",".join(move.evidence), "approver": move.approver}
        for member in reversed(self.lineage(version.ref.digest)) if move.evidence and move.stage not in NOTES else ():
            if not self.server.holds(MAIN, _place(member.ref)):
                message = f"{member.ref.name} {member.number}, for {move.stage} of {version.ref.name} {version.number}"
                self.server.merge(_tag(member), MAIN, message, evidence)

    def tag(self, ref: ArtifactRef, label: str) -> None:
        check_name(label)
        with self._errors(f"tag {ref.name}"):
            version = self._version(ref.name, ref.digest)
            try:
                self.server.tag(f"{ref.name}.label.{label}", self._tags(_tag(version))[_tag(version)])
            except Taken:
                refuse_other(self.tags(ref.name)[label], ref, label)

    def tags(self, name: str) -> dict[str, ArtifactRef]:
        with self._errors("be read"):
            prefix, commits = f"{name}.label.", {commit: tag for tag, commit in self._tags(f"{name}.v").items()}
            refs = {_tag(version): version.ref for version in self.versions(name)}
            return {tag.removeprefix(prefix): refs[commits[commit]] for tag, commit in self._tags(prefix).items()}

    def moves(self, name: str, stage: str | None = None) -> list[StageMove]:
        with self._errors("be read"):
            tags = self._tags(f"{name}.move.")
            found = self._commits((match, commit) for tag, commit in tags.items() if (match := MOVE.fullmatch(tag)))
            moves = [_move(match[0], name, int(match[2]), said) for match, said in found]
            return sorted((move for move in moves if stage in (None, move.stage)), key=lambda move: move.counter)

    def _tags(self, prefix: str) -> dict[str, str]:
        try:
            return self.server.tags(prefix)
        except Missing:  # the repository: the first `put` makes it
            return {}

    def _commits(self, wanted: Iterable[tuple[re.Match[str], str]]) -> list[tuple[re.Match[str], dict[str, str]]]:
        """The metadata of commits: from memory, else from disk, else from the server, several at once."""
        pairs = list(wanted)
        unknown = {commit for _, commit in pairs} - self._known.keys()
        if unknown:
            with ThreadPoolExecutor(WORKERS) as pool:
                self._known.update(zip(unknown, pool.map(self._metadata, unknown), strict=True))
        return [(match, self._known[commit]) for match, commit in pairs]

    def _metadata(self, commit: str) -> dict[str, str]:
        path = self.root / "commits" / f"{commit}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            metadata = self.server.metadata(commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{commit}.{time.monotonic_ns()}")
        draft.write_text(json.dumps(metadata))
        draft.replace(path)
        return metadata

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn what the file system, the lock and JSON raise into this project's errors; the server's are so already."""
        try:
            yield
        except OneRewardError:
            raise
        except filelock.Timeout as error:
            raise StoreError(f"{self.root} is locked by another process.", "Let the other run end, or end it.") from error
        except Exception as error:
            if no_space(error):
                raise DiskFull(f"No space left in {self.root} to {doing}.", "Free space or move the home.") from error
            raise StoreError(f"{self.server.repository} could not {doing}: {error}.", "See the cause above; no version changed.") from error


def prepare(server: Server) -> None:
    """Make the repository if there is none; give `main` its hook and its protection if it is not protected. Safe to repeat and to race.

    Raises Missing when another process finished the same at this moment: repeat it.
    """
    if not server.exists():
        with suppress(Taken):  # another process made it just now
            server.create()
    if not server.protected():
        server.branch(SETUP)
        digest = _sha256(HOOK)
        server.upload(SETUP, HOOK_PATH, HOOK, digest)
        message = "Demand evidence for every merge into main"
        # The hook is in force for the merge that brings it, and gets itself as evidence.
        server.merge(server.commit(SETUP, message, {}), MAIN, message, {"evidence": digest})
        server.protect()
        server.drop(SETUP)


def run_branch_of(run_id: str) -> str:
    """The branch that shows what a run made."""
    return f"run-{re.sub(r'[^A-Za-z0-9_-]', '-', run_id) or 'none'}"


def _now(stored: list[Version]) -> str:
    """The time, but after every record: a clock that steps back must not reorder history."""
    newest_record = max((datetime.fromisoformat(v.created) for v in stored), default=datetime.min.replace(tzinfo=UTC))
    return max(datetime.now(UTC), newest_record + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def _place(ref: ArtifactRef) -> str:
    return f"artifacts/{ref.name}/{ref.digest}/"


def _tag(version: Version) -> str:
    return f"{version.ref.name}.v{version.number:06d}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(folder: Path, digest: str) -> bool:
    return folder.is_dir() and directory_digest(folder)[0] == digest


def _version(name: str, number: int, said: dict[str, str]) -> Version:
    try:
        fields = json.loads(said["version"])
        ref, parents = ArtifactRef(**fields.pop("ref")), tuple(ArtifactRef(**each) for each in fields.pop("parents"))
        return Version(ref=ref, parents=parents, **fields | {"number": number})
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"The tag {name}.v{number:06d} was not made by this store.", "Delete it with lakectl tag delete.") from error


def _move(tag: str, name: str, counter: int, said: dict[str, str]) -> StageMove:
    try:
        fields = json.loads(said["move"])
        move = StageMove(**fields | {"evidence": tuple(fields["evidence"])})
        if (move.name, move.counter) != (name, counter):
            raise ValueError("it holds another move")
        return move
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"The tag {tag} was not made by this store.", "Delete it with lakectl tag delete.") from error


def _mismatch(version: Version, how: str) -> DigestMismatch:
    what = f"The stored bytes of {version.ref.name} {version.number} ({version.ref.digest[:12]}) {how}."
    return DigestMismatch(what, "Restore the repository from a backup, or run the chain again into another one.")
