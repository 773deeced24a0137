"""Artifacts in a DVC registry: a git + DVC repository of its own under the workspace home.

    store = DvcStore(home / "registry")                             # or DvcStore(..., remote="s3://bucket/prefix")
    ref = store.put("curated_dataset", folder, key=key, run_id=run)
    folder = store.get(ref)

Layout of the registry:
    artifacts/<name>/, <name>.dvc   the newest version's bytes, tracked by DVC; dvc.yaml names them for `dvc artifacts get`
    records/, manifests/            what infra/stores/records.py reads
    checkouts/<digest>/             what `get` hands out, linked from DVC's cache, files read-only
    .work/                          what puts under way have begun, and the hashes of folders put before
One commit per version; stages are annotated tags in GTO's format (`<name>@v1.0.<number>`, `<name>#<stage>#<counter>`), so
`git log`, `dvc status` and `gto show` work in the registry. The last commit is the truth: a writer that fails or is killed
leaves `.pending` behind until the working tree is back at that commit. Bytes are copied before the lock is taken, and checked
to be there once it is: an object that no commit leads to is a leftover, which the next put of the same bytes uses and `gc`
removes. A stage is resolved by its highest counter and not by GTO, which goes by tag times: these have whole seconds, and after
a rollback it names the wrong version.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import yaml

from infra.disk import no_space
from infra.progress import Progress
from infra.stores.base import (
    NAME,
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
    refuse_other,
)
from infra.stores.cache import Cache
from infra.stores.content import Remembered, StoredFile, digest_of, metered, walk
from infra.stores.history import History
from infra.stores.incoming import Arrival, Incoming
from infra.stores.records import Records, commit_message, manifest_path, manifest_text, read_manifest, record_path, record_text
from infra.stores.remote import DVC_CONFIG, Remote, quiet_dvc
from models.errors import DigestMismatch, DiskFull, OneRewardError, StoreError

LOCK_TIMEOUT_S = 300.0  # ours: no lock is held while bytes are copied, but for a `get` of the same digest
LABELS = "label/"  # git tags without @ and #: GTO leaves them alone


class DvcStore(ArtifactStore):
    """An artifact store in a folder. Made on first use; safe to open from several processes.

    remote: a folder or `s3://bucket/prefix`. A put is then complete only when its bytes are there too, and `get` fetches from
    there what the cache has lost.
    """

    def __init__(self, root: Path, lock_timeout: float = LOCK_TIMEOUT_S, remote: str | None = None):
        self.root = root.resolve()
        self.lock_timeout = lock_timeout
        self.remote = Remote(self.root, remote) if remote else None
        self.history = History(self.root)
        self.records = Records(self.root)
        self.cache = Cache(self.root / ".dvc" / "cache" / "files" / "md5")
        self.incoming = Incoming(self.root / ".work" / "incoming")
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
            self._configure()

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
        check_name(name)
        with self._errors(f"store {name}"):
            known = Remembered(self.root / ".work" / "hashes", folder, walk(folder))
            files = list(known.files.values())
            same = self._same(name, key, files) if len(files) == len(known.found) and self._held(files) else None
            if same and self.cache.path(self.records.object_id(same)).exists():
                self._upload(name, self.records.object_id(same), files, progress)
                return same.ref
            for parent in parents:
                self._version(parent.name, parent.digest)
            config, metadata = dict(config or {}), dict(metadata or {})
            json.dumps([config, metadata])  # what JSON cannot hold is told before the bytes are copied
            with self._arriving(run_id) as arrival:
                files = arrival.bring(folder, known, name, progress)
                object_id = arrival.bring_list(files)
                self._upload(name, object_id, files, progress)
                with self._locked():
                    if not self._held(files) or not self.cache.path(object_id).exists():  # collected, or taken back by another put
                        files = arrival.bring(folder, known, name, progress)
                        arrival.bring_list(files)
                    if same := self._same(name, key, files):
                        return same.ref
                    digest, size = digest_of((f.path, f.sha256) for f in files), sum(f.size for f in files)
                    ref = ArtifactRef(name, digest, f"dvc://{self.root.name}?name={name}&digest={digest}", size)
                    number = 1 + max((v.number for v in self.records.newest_first(name)), default=0)
                    when = self.records.now()
                    version = Version(ref, number, key, tuple(parents), run_id, when, code_version, config, metadata)
                    self._commit(version, object_id, files, arrival)
        return ref

    def get(self, ref: ArtifactRef, progress: Progress | None = None) -> Path:
        """See ArtifactStore. The files are read-only and may be hard links into DVC's cache: never write to them."""
        version = self._version(ref.name, ref.digest)
        target = self.root / "checkouts" / ref.digest
        if _intact(target, ref.digest):
            return target
        with self._errors(f"read {ref.name}"):
            target.parent.mkdir(exist_ok=True)
            with self._waiting(self._reading(ref.digest)):
                if _intact(target, ref.digest):  # another process may have linked it meanwhile
                    return target
                part = target.with_name(f"{ref.digest}.part")
                try:
                    files = self.records.manifest(ref.digest)
                    bad = self.cache.assemble(files, part, progress)
                    if bad and self.remote:
                        self._fetch(version, bad, part, progress)
                        bad = self.cache.assemble(files, part, progress)
                    if bad:
                        raise _mismatch(version, bad[0])
                    shutil.rmtree(target, ignore_errors=True)
                    part.rename(target)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        return target

    def diff(self, a: ArtifactRef, b: ArtifactRef) -> list[FileChange]:
        for ref in (a, b):
            self._version(ref.name, ref.digest)
        before, after = (self.records.manifest(ref.digest) for ref in (a, b))
        return file_changes({f.path: (f.sha256, f.size) for f in before}, {f.path: (f.sha256, f.size) for f in after})

    def gc(self, dry_run: bool = True, live: Collection[str] = ()) -> GcReport:
        """See ArtifactStore. A remote may be shared, and is left alone."""
        with self._errors("be cleaned"), self._locked():
            wanted = self._referenced() | self.incoming.objects(live)
            garbage = [path for object_id, path in self.cache.objects() if object_id not in wanted]
            leftovers = [*self.incoming.leftovers(live), *self._half_read()]
            sizes = {path: path.stat().st_size for path in (*garbage, *leftovers)}
            for path in [] if dry_run else sizes:
                path.unlink(missing_ok=True)
        return GcReport(tuple(sorted(str(path.relative_to(self.root)) for path in sizes)), sum(sizes.values()), dry_run)

    def versions(self, name: str | None = None) -> list[Version]:
        return self.records.all(name)

    def assign(
        self, ref: ArtifactRef, stage: str, *, approver: str, reason: str, evidence: Sequence[str] = (), seal: Seal | None = None
    ) -> StageMove:
        check_name(stage)
        with self._errors(f"point {stage} at {ref.name}"), self._locked():
            version = self._version(ref.name, ref.digest)
            earlier = self.moves(ref.name)
            counter = 1 + max((m.counter for m in earlier), default=0)
            when = datetime.now(UTC).isoformat(timespec="microseconds")
            move = StageMove(ref.name, stage, ref.digest, version.number, counter, when, approver, reason, tuple(evidence))
            move = seal(earlier, move) if seal else move
            with self._writing(ref.name):
                commit = self.history.introduced(record_path(ref.name, version.number), f"{ref.name} {version.number}: ")
                registered = f"{ref.name}@v1.0.{version.number}"
                if registered not in self.history.tags(registered):
                    self.history.tag(registered, commit, f"{ref.name} {version.number}, digest {ref.digest}\n")
                self.history.tag(f"{ref.name}#{stage}#{counter}", commit, json.dumps(dataclasses.asdict(move), indent=2) + "\n")
        return move

    def tag(self, ref: ArtifactRef, label: str) -> None:
        check_name(label)
        with self._errors(f"tag {ref.name}"), self._locked():
            version = self._version(ref.name, ref.digest)
            taken = self.tags(ref.name).get(label)
            if taken is not None:
                refuse_other(taken, ref, label)
                return
            with self._writing(ref.name):
                commit = self.history.introduced(record_path(ref.name, version.number), f"{ref.name} {version.number}: ")
                self.history.tag(f"{LABELS}{ref.name}/{label}", commit, f"{ref.digest}\n")

    def tags(self, name: str) -> dict[str, ArtifactRef]:
        prefix = f"{LABELS}{name}/"
        return {tag.removeprefix(prefix): self._version(name, said.strip()).ref for tag, said in self.history.tags(prefix).items()}

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

    # Bytes

    def _upload(self, name: str, object_id: str, files: Iterable[StoredFile], progress: Progress | None) -> None:
        """Let the remote, where there is one, hold all objects of an artifact."""
        if self.remote:
            objects = {file.md5: file.size for file in files} | {object_id: self.cache.path(object_id).stat().st_size}
            with metered(progress, f"upload {name}", sum(objects.values())) as meter:
                self.remote.push(self.cache, objects, meter)

    def _fetch(self, version: Version, files: Iterable[StoredFile], drafts: Path, progress: Progress | None) -> None:
        """Put what the remote holds in the place of objects that are absent or damaged."""
        assert self.remote is not None
        objects = {file.md5: file.size for file in files}
        for object_id in objects:
            self.cache.path(object_id).unlink(missing_ok=True)
        with metered(progress, f"fetch {version.ref.name}", sum(objects.values())) as meter:
            self.remote.fetch(self.cache, objects, drafts, meter)

    def _half_read(self) -> list[Path]:
        """The files of reads that were killed: the next `get` of the same digest begins anew."""
        found: list[Path] = []
        for part in (self.root / "checkouts").glob("*.part"):
            with suppress(filelock.Timeout), filelock.FileLock(self._reading(part.stem), timeout=0):
                found += (path for path in part.rglob("*") if path.is_file())
        return found

    def _reading(self, digest: str) -> Path:
        """The lock of whoever makes the checkout of a digest."""
        return self.root / "checkouts" / f".{digest}.lock"

    def _held(self, files: Iterable[StoredFile]) -> bool:
        return all(self.cache.has(file) for file in files)

    def _same(self, name: str, key: str, files: Iterable[StoredFile]) -> Version | None:
        """The version that has this content and this key."""
        digest = digest_of((file.path, file.sha256) for file in files)
        return next((v for v in self.records.newest_first(name) if v.ref.digest == digest and v.key == key), None)

    def _referenced(self) -> set[str]:
        """The ids of the objects that committed versions consist of."""
        lists = {json.loads(record)["object"] for record in self.history.files("records")}
        return lists | {file.md5 for manifest in self.history.files("manifests") for file in read_manifest(manifest)}

    @contextmanager
    def _arriving(self, run_id: str) -> Iterator[Arrival]:
        """A put under way. A full disk gets back what it brought; after any other failure that stays for the next try."""
        with self._locked():
            arrival = self.incoming.open(self.cache, run_id)
        try:
            yield arrival
        except BaseException as error:
            if no_space(error):
                with suppress(Exception), self._locked():
                    for object_id in arrival.added - self._referenced():
                        self.cache.path(object_id).unlink(missing_ok=True)
            raise
        finally:
            arrival.close()

    # One writer at a time, all or nothing

    def _create(self) -> None:
        from dvc.repo import Repo

        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.history.exists():
                return
            for leftover in (".git", ".dvc"):  # of a creation that was interrupted: there is no commit, so nothing was stored
                shutil.rmtree(self.root / leftover, ignore_errors=True)
            self.history.create()
            quiet_dvc()
            Repo.init(str(self.root)).close()
            files = {
                ".dvc/config": DVC_CONFIG,
                ".dvc/.gitignore": (self.root / ".dvc" / ".gitignore").read_text(),
                ".dvcignore": "/checkouts\n/.work\n",
                ".gitignore": "/checkouts\n/.work\n/.lock\n/.pending\n",
            }
            self.history.commit({path: text.encode() for path, text in files.items()}, "Create the registry")
            (self.root / "records").mkdir()

    def _configure(self) -> None:
        """Write the remote's address where DVC's own commands look for it."""
        path = self.root / ".dvc" / "config"
        if self.remote and self.remote.config != path.read_text():
            with self._locked(), self._writing(""):
                self.history.commit({".dvc/config": self.remote.config.encode()}, f"Use the remote {self.remote.url}")

    def _commit(self, version: Version, object_id: str, files: list[StoredFile], arrival: Arrival) -> None:
        """Make the version the newest of its name: working copy, DVC's files, record and manifest, as one commit."""
        name = version.ref.name
        with self._writing(name):
            working = self.root / "artifacts" / name
            shutil.rmtree(working, ignore_errors=True)
            self.cache.link(files, arrival.folder / "tree")
            working.parent.mkdir(exist_ok=True)
            (arrival.folder / "tree").rename(working)
            names = sorted({path.parent.name for path in (self.root / "records").glob("*/000001.json")} | {name})
            out = {"md5": object_id, "size": version.ref.size, "nfiles": len(files), "hash": "md5", "path": name}
            contents = {
                f"artifacts/{name}.dvc": yaml.safe_dump({"outs": [out]}, sort_keys=False),
                "artifacts/.gitignore": "".join(f"/{each}\n" for each in names),
                "dvc.yaml": yaml.safe_dump({"artifacts": {each: {"path": f"artifacts/{each}"} for each in names}}),
                manifest_path(version.ref.digest): manifest_text(files),
                record_path(name, version.number): record_text(version, object_id),
            }
            self.history.commit({path: text.encode() for path, text in contents.items()}, commit_message(version))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock. What a killed writer left is repaired first."""
        with self._waiting(self.root / ".lock"):
            if self._pending.exists():
                self._recover()
            yield

    @contextmanager
    def _waiting(self, lock: Path) -> Iterator[None]:
        try:
            held = filelock.FileLock(lock, timeout=self.lock_timeout)
            held.acquire()
        except filelock.Timeout as error:
            what = f"{self.root} has been locked by another process for {self.lock_timeout:g} s."
            raise StoreError(what, "Let the other run end, or end it; its lock goes with it.") from error
        try:
            yield
        finally:
            held.release()

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """All or nothing: on any failure, Ctrl-C included, the versions are brought back to the last commit."""
        self._pending.write_text(name)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # where even this fails, `.pending` stays and the next to open the store repairs it
                self._recover()
            raise
        self._pending.unlink()

    def _recover(self) -> None:
        """Back to the last commit: the working tree, and the working copy of the artifact that was being written."""
        name = self._pending.read_text()
        self.history.reset()
        if name:
            shutil.rmtree(self.root / "artifacts" / name, ignore_errors=True)
            newest = next(self.records.newest_first(name), None)
            if newest is not None:
                self.cache.link(self.records.manifest(newest.ref.digest), self.root / "artifacts" / name)
        self._pending.unlink()

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


def _intact(folder: Path, digest: str) -> bool:
    return folder.is_dir() and directory_digest(folder)[0] == digest


def _mismatch(version: Version, file: StoredFile) -> DigestMismatch:
    what = f"{file.path} of {version.ref.name} {version.number} ({version.ref.digest[:12]}) is missing from the store or damaged."
    return DigestMismatch(what, "Put the same files again, restore the registry from a backup, or run the chain again.")
