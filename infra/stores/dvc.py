"""Artifacts in a DVC registry: a git + DVC repository of its own under the workspace home.

    store = DvcStore(home / "registry")
    ref = store.put("curated_dataset", folder, key=key, run_id=run)
    folder = store.get(ref)

Layout of the registry:
    artifacts/<name>/, <name>.dvc   the newest version's bytes, tracked by DVC
    records/<name>/<number>.json    one record per version, never changed; `find`, `versions` and `lineage` read these alone
    checkouts/<digest>/             what `get` hands out, linked from DVC's cache, files read-only
One commit per version; stages are annotated tags in GTO's format (`<name>@v1.0.<number>`, `<name>#<stage>#<counter>`), so
`git log`, `dvc status` and `gto show` work in the registry. The last commit is the truth: a writer that fails or is killed
leaves `.pending` behind until the working tree and the cache are back at that commit. A stage is resolved by its highest
counter and not by GTO, which goes by tag times: these have whole seconds, and after a rollback it names the wrong version.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock

from infra.disk import no_space
from infra.progress import Progress
from infra.stores.base import ArtifactRef, ArtifactStore, FileChange, GcReport, Seal, StageMove, Version, directory_digest
from infra.stores.history import History
from infra.stores.records import commit_message, read_record, record_path, record_text
from models.errors import DigestMismatch, DiskFull, OneRewardError, StoreError, UnknownVersion

if TYPE_CHECKING:
    from dvc.repo import Repo

LOCK_TIMEOUT_S = 300.0  # ours: longer than storing a full-size model takes
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*[a-z0-9]")  # a subset of what GTO allows, safe as a file name
# Hard links first: DVC then moves a new file into its cache instead of copying it once more, and makes it read-only.
DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
    check_update = false
[cache]
    dir = cache
    type = "hardlink,reflink,copy"
"""


class DvcStore(ArtifactStore):
    """An artifact store in a folder. Made on first use; safe to open from several processes."""

    def __init__(self, root: Path, lock_timeout: float = LOCK_TIMEOUT_S):
        self.root = root.resolve()
        self.lock_timeout = lock_timeout
        self.history = History(self.root)
        self._pending = self.root / ".pending"
        with self._errors("be opened"):
            if not self.history.exists():
                self._create()
            elif not (self.root / ".dvc" / "config").exists():
                raise StoreError(f"{self.root} is a git repository but no registry.", "Name another folder as home.")
            elif self._pending.exists():
                # A live writer has this file too, and holds the lock: then there is nothing to repair.
                with suppress(filelock.Timeout), filelock.FileLock(self.root / ".lock", timeout=0):
                    if self._pending.exists():  # it may have ended between the two lines above
                        self._recover()

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
        """See ArtifactStore. Also raises StoreError for an unusable folder."""
        _check_name(name)
        files = _check_folder(folder)
        with self._errors(f"store {name}"), self._locked():
            digest, size = directory_digest(folder)
            same = next((v for v in self._newest_first(name) if v.ref.digest == digest and v.key == key), None)
            if same is not None:
                return same.ref
            for parent in parents:
                self._version(parent.name, parent.digest)
            with self._writing(name):
                object_id, *stored = self._add(name, folder)
                if stored != [files, size]:
                    raise StoreError(
                        f"{folder} changed while it was stored, or DVC skipped files.", "Let its writer end; name files plainly."
                    )
                number = 1 + max((v.number for v in self._newest_first(name)), default=0)
                ref = ArtifactRef(name, digest, f"dvc://{self.root.name}?name={name}&digest={digest}", size)
                version = Version(
                    ref, number, key, tuple(parents), run_id, self._now(), code_version, dict(config or {}), dict(metadata or {})
                )
                record = record_text(version, object_id)
                paths = [f"artifacts/{name}.dvc", "artifacts/.gitignore"]
                contents = {path: (self.root / path).read_bytes() for path in paths}
                self.history.commit(contents | {record_path(name, number): record.encode()}, commit_message(version))
        return ref

    def get(self, ref: ArtifactRef, progress: Progress | None = None) -> Path:
        """See ArtifactStore. The files are read-only and may be hard links into DVC's cache: never write to them."""
        version = self._version(ref.name, ref.digest)
        target = self.root / "checkouts" / ref.digest
        if _intact(target, ref.digest):
            return target
        with self._errors(f"read {ref.name}"), self._locked():
            if _intact(target, ref.digest):  # another process may have linked it meanwhile
                return target
            part = target.with_name(f"{ref.digest}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                self._link(version, part)
                if not _intact(part, ref.digest):
                    raise _mismatch(version, "do not hash to it")
                shutil.rmtree(target, ignore_errors=True)
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return target

    def diff(self, a: ArtifactRef, b: ArtifactRef) -> list[FileChange]:
        before, after = (self._contents(self._version(ref.name, ref.digest)) for ref in (a, b))
        changes = []
        for path in sorted(before.keys() | after.keys()):
            old, new = before.get(path), after.get(path)
            if old != new:
                kind: Literal["added", "removed", "changed"] = "added" if old is None else "removed" if new is None else "changed"
                changes.append(FileChange(path, kind, old and old[1], new and new[1]))
        return changes

    def gc(self, dry_run: bool = True, live: Collection[str] = ()) -> GcReport:
        with self._errors("be cleaned"), self._locked():
            sizes = {path: path.stat().st_size for path in self._unreferenced()}
            for path in [] if dry_run else sizes:
                path.unlink()
        return GcReport(tuple(sorted(str(path.relative_to(self.root)) for path in sizes)), sum(sizes.values()), dry_run)

    def find(self, name: str, key: str) -> Version | None:
        return next((v for v in self._newest_first(name) if v.key == key), None) if key else None

    def versions(self, name: str | None = None) -> list[Version]:
        names = [name] if name is not None else sorted(p.name for p in (self.root / "records").glob("*"))
        return sorted((v for each in names for v in self._newest_first(each)), key=lambda v: v.created)

    def version(self, digest: str) -> Version:
        found = [v for v in self.versions() if v.ref.digest.startswith(digest)] if len(digest) >= 8 else []
        if len({v.ref.digest for v in found}) > 1:
            raise UnknownVersion(f"{digest!r} begins more than one digest.", "Give more of its digits.")
        if not found:
            raise UnknownVersion(f"{self.root} holds no version {digest!r}.", "`onereward versions` lists them; give 8 digits or more.")
        return found[-1]

    def lineage(self, digest: str) -> list[Version]:
        first = self.version(digest)
        known = {(first.ref.name, first.number): first}
        edges: dict[tuple[str, int], list[tuple[str, int]]] = {}
        open_ = list(known)
        while open_:
            node = open_.pop()
            # A parent existed before its child: looking no later keeps the graph free of cycles when bytes are stored again.
            parents = [self._version(p.name, p.digest, before=known[node].created) for p in known[node].parents]
            edges[node] = [(p.ref.name, p.number) for p in parents]
            for parent, label in zip(parents, edges[node], strict=True):
                if label not in known:
                    known[label] = parent
                    open_.append(label)
        return [known[node] for node in reversed(list(TopologicalSorter(edges).static_order()))]

    def stage(self, name: str, stage: str) -> ArtifactRef | None:
        moves = self.moves(name, stage)
        return self._version(name, moves[-1].digest).ref if moves else None

    def assign(
        self, ref: ArtifactRef, stage: str, *, approver: str, reason: str, evidence: Sequence[str] = (), seal: Seal | None = None
    ) -> StageMove:
        _check_name(stage)
        with self._errors(f"point {stage} at {ref.name}"), self._locked():
            version = self._version(ref.name, ref.digest)
            earlier = self.moves(ref.name)
            counter = 1 + max((m.counter for m in earlier), default=0)
            when = datetime.now(UTC).isoformat(timespec="microseconds")
            move = StageMove(ref.name, stage, ref.digest, version.number, counter, when, approver, reason, tuple(evidence))
            move = seal(earlier, move) if seal else move
            with self._writing(ref.name):
                commit = self.history.introduced(record_path(ref.name, version.number))
                registered = f"{ref.name}@v1.0.{version.number}"
                if registered not in self.history.tags(registered):
                    self.history.tag(registered, commit, f"{ref.name} {version.number}, digest {ref.digest}\n")
                self.history.tag(f"{ref.name}#{stage}#{counter}", commit, json.dumps(dataclasses.asdict(move), indent=2) + "\n")
        return move

    def moves(self, name: str, stage: str | None = None) -> list[StageMove]:
        pattern = re.compile(rf"{re.escape(name)}#(?P<stage>{NAME.pattern})#(?P<counter>\d+)")
        found = []
        for tag, message in self.history.tags(f"{name}#").items():
            match = pattern.fullmatch(tag)
            if match is None or stage not in (None, match["stage"]):
                continue
            try:
                move = StageMove(**json.loads(message))
            except (json.JSONDecodeError, TypeError) as error:
                raise StoreError(f"The tag {tag} in {self.root} was not made by this store.", f"Remove it: git tag -d '{tag}'.") from error
            if (move.name, move.stage, move.counter) != (name, match["stage"], int(match["counter"])):
                raise StoreError(f"The tag {tag} in {self.root} holds another move, {move.counter} of {move.name}.", "Remove the tag.")
            found.append(dataclasses.replace(move, evidence=tuple(move.evidence)))
        return sorted(found, key=lambda move: move.counter)

    # Records

    def _newest_first(self, name: str) -> Iterator[Version]:
        for path in sorted((self.root / "records" / name).glob("*.json"), reverse=True):
            yield read_record(path)[0]

    def _version(self, name: str, digest: str, before: str | None = None) -> Version:
        """The newest record of (name, digest), made before a moment."""
        for version in self._newest_first(name):
            if version.ref.digest == digest and (before is None or version.created < before):
                return version
        raise UnknownVersion(f"{self.root} holds no {name} with digest {digest[:12]}.", "`onereward versions` lists what it holds.")

    def _now(self) -> str:
        """The time, but after every record: a clock that steps back must not reorder history."""
        now = datetime.now(UTC)
        for folder in (self.root / "records").glob("*"):
            newest = max(folder.glob("*.json"), default=None)
            if newest is not None:
                now = max(now, datetime.fromisoformat(read_record(newest)[0].created) + timedelta(microseconds=1))
        return now.isoformat(timespec="microseconds")

    # Bytes, through DVC

    def _create(self) -> None:
        from dvc.repo import Repo

        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.history.exists():
                return
            for leftover in (".git", ".dvc"):  # of a creation that was interrupted: there is no commit, so nothing was stored
                shutil.rmtree(self.root / leftover, ignore_errors=True)
            self.history.create()
            _quiet_dvc()
            Repo.init(str(self.root)).close()
            files = {
                ".dvc/config": DVC_CONFIG,
                ".dvc/.gitignore": (self.root / ".dvc" / ".gitignore").read_text(),
                ".dvcignore": "/checkouts\n",
                ".gitignore": "/checkouts\n/.lock\n/.pending\n",
            }
            self.history.commit({path: text.encode() for path, text in files.items()}, "Create the registry")
            (self.root / "records").mkdir()

    @contextmanager
    def _dvc(self) -> Iterator[Repo]:
        """DVC's view of the registry, opened anew: a long-lived one goes stale."""
        from dvc.repo import Repo

        _quiet_dvc()
        # Where DVC remembers file hashes; inside the registry, so that a full disk elsewhere or another user's cache is no matter.
        repo = Repo(str(self.root), config={"core": {"site_cache_dir": str(self.root / ".dvc" / "tmp" / "site")}})
        try:
            yield repo
        finally:
            repo.close()

    def _add(self, name: str, folder: Path) -> tuple[str, int, int]:
        """Copy a folder to `artifacts/<name>` and let DVC track it: DVC's id of it, its files and bytes as DVC counts them."""
        target = self.root / "artifacts" / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, copy_function=shutil.copyfile)
        with self._dvc() as repo:
            (stage,) = repo.add(str(target))
            (out,) = stage.outs
            return out.hash_info.value, out.meta.nfiles, out.meta.size

    def _link(self, version: Version, target: Path) -> None:
        """Put a version's files at `target` from the cache, read-only. Raises DigestMismatch when the cache has lost some."""
        from dvc_data.hashfile.checkout import CheckoutError, checkout
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectDBError

        object_id = read_record(self.root / record_path(version.ref.name, version.number))[1]
        target.parent.mkdir(exist_ok=True)
        with self._dvc() as repo:
            cache = repo.cache.local
            try:
                checkout(str(target), cache.fs, Tree.load(cache, HashInfo("md5", object_id)), cache, force=True, quiet=True)
            except (CheckoutError, ObjectDBError, FileNotFoundError) as error:
                raise _mismatch(version, "are missing from the cache or unreadable") from error
        for path in target.rglob("*"):
            if path.is_file():
                path.chmod(0o444)

    # One writer at a time, all or nothing

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock. What a killed writer left is repaired first."""
        try:
            with filelock.FileLock(self.root / ".lock", timeout=self.lock_timeout):
                if self._pending.exists():
                    self._recover()
                yield
        except filelock.Timeout as error:
            what = f"{self.root} has been locked by another process for {self.lock_timeout:g} s."
            raise StoreError(what, "Let the other run end, or end it; its lock goes with it.") from error

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """All or nothing: on any failure, Ctrl-C included, the store is brought back to its last commit."""
        self._pending.write_text(name)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # where even this fails, `.pending` stays and the next to open the store repairs it
                self._recover()
            raise
        self._pending.unlink()

    def _recover(self) -> None:
        """Back to the last commit: cache, working tree, and the working copy of the artifact that was being written."""
        name = self._pending.read_text()
        shutil.rmtree(self.root / ".dvc" / "tmp", ignore_errors=True)  # DVC's own locks and hash memory, perhaps half written
        if name:
            shutil.rmtree(self.root / "artifacts" / name, ignore_errors=True)
        for path in self._unreferenced():
            path.unlink()
        self.history.reset()
        newest = next(self._newest_first(name), None) if name else None
        if newest is not None:
            self._link(newest, self.root / "artifacts" / newest.ref.name)
        self._pending.unlink()

    def _unreferenced(self) -> list[Path]:
        """Cache objects that no committed record leads to: the leftovers of versions that were never stored."""
        cache = self.root / ".dvc" / "cache" / "files" / "md5"
        wanted = set()
        for record in self.history.files("records"):
            object_id = json.loads(record)["object"]
            directory = cache / object_id[:2] / object_id[2:]
            wanted.add(directory)
            if directory.exists():
                wanted |= {cache / entry["md5"][:2] / entry["md5"][2:] for entry in json.loads(directory.read_text())}
        return [path for path in cache.rglob("*") if path.is_file() and path not in wanted]

    def _contents(self, version: Version) -> dict[str, tuple[str, int]]:
        """Path -> (MD5, bytes) of a version's files, as DVC's cache has them."""
        cache = self.root / ".dvc" / "cache" / "files" / "md5"
        object_id = read_record(self.root / record_path(version.ref.name, version.number))[1]
        try:
            entries = json.loads((cache / object_id[:2] / object_id[2:]).read_text())
            return {e["relpath"]: (e["md5"], (cache / e["md5"][:2] / e["md5"][2:]).stat().st_size) for e in entries}
        except (OSError, ValueError) as error:
            raise _mismatch(version, "are missing from the cache or unreadable") from error

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn what DVC, git, SQLite and the file system raise into this project's errors."""
        try:
            yield
        except OneRewardError:
            raise
        except Exception as error:
            if no_space(error):
                raise DiskFull(
                    f"No space left in {self.root} to {doing}.", "Free space or move the home; the store is as it was."
                ) from error
            raise StoreError(f"{self.root} could not {doing}: {error}.", "See the cause above; the store is as it was.") from error


def _quiet_dvc() -> None:
    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # it prints hints and bars; its errors reach us as exceptions


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name an artifact or a stage.", "Use a-z, 0-9, - and _; begin and end with a letter or digit.")


def _check_folder(folder: Path) -> int:
    """The number of files. Raises StoreError for a folder that is absent, empty or holds links."""
    paths = list(folder.rglob("*")) if folder.is_dir() else []
    for path in paths:
        if path.is_symlink():
            raise StoreError(f"{path} is a symbolic link.", "An artifact holds its own bytes: put the file itself there.")
    files = sum(path.is_file() for path in paths)
    if not files:
        raise StoreError(f"{folder} is no folder with files in it.", "An artifact is a folder that holds at least one file.")
    return files


def _intact(folder: Path, digest: str) -> bool:
    return folder.is_dir() and directory_digest(folder)[0] == digest


def _mismatch(version: Version, how: str) -> DigestMismatch:
    what = f"The stored bytes of {version.ref.name} {version.number} ({version.ref.digest[:12]}) {how}."
    return DigestMismatch(what, "Restore the registry from a backup, or move it away and run the chain again.")
