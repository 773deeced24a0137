"""What puts under way have begun: a folder for each, with its drafts and the names of the objects it relies on.

A put holds the lock in its folder. One that was killed no longer does: its drafts are then removed by the next writer, its
objects stay for whoever puts the same bytes again, until they are collected.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import filelock

from infra.progress import Progress
from infra.stores.cache import Cache, list_of
from infra.stores.content import WORKERS, Remembered, StoredFile, copy_hashed, in_parallel, metered, walk
from models.errors import StoreError

KEPT = ("run", "objects")  # what a put's folder says of it once it was killed


class Arrival:
    """One put under way."""

    def __init__(self, folder: Path, cache: Cache, run_id: str):
        self.folder, self.cache = folder, cache
        folder.mkdir(parents=True)
        (folder / "run").write_text(run_id)
        self._lock = filelock.FileLock(folder / "lock")
        self._lock.acquire()
        self._writing = threading.Lock()
        self.added: set[str] = set()  # objects that were not there before

    def bring(self, folder: Path, known: Remembered, name: str, progress: Progress | None) -> list[StoredFile]:
        """Bring a folder's files into the cache, reading each once; those that are known and there are not read at all.

        Raises StoreError when the folder changes meanwhile.
        """
        total = sum(each.size for each in known.found.values())
        with metered(progress, f"store {name}", total) as meter, ThreadPoolExecutor(2 * WORKERS) as hashers:

            def one(path: str) -> StoredFile:
                file = known.files.get(path)
                if file is not None:
                    self._relies_on(file.md5)
                    if self.cache.has(file):
                        meter.add(file.size)
                        return file
                draft = self._draft()
                file = StoredFile(path, known.found[path].size, *copy_hashed(folder / path, draft, meter, hashers))
                self._take(draft, file.md5)
                known.add(file)
                return file

            files = in_parallel(one, known.found, meter)
        if [(path, each.content) for path, each in walk(folder).items()] != [(path, each.content) for path, each in known.found.items()]:
            raise StoreError(f"{folder} changed while it was stored.", "Let its writer end and try again.")
        return files

    def bring_list(self, files: Iterable[StoredFile]) -> str:
        """Bring the list of a directory's files into the cache; its id."""
        object_id, content = list_of(files)
        draft = self._draft()
        draft.write_bytes(content)
        self._take(draft, object_id)
        return object_id

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _draft(self) -> Path:
        return self.folder / f"{uuid.uuid4().hex}.part"

    def _take(self, draft: Path, object_id: str) -> None:
        self._relies_on(object_id)
        if self.cache.take(draft, object_id):
            self.added.add(object_id)

    def _relies_on(self, object_id: str) -> None:
        """Tell collectors to leave an object alone."""
        with self._writing, (self.folder / "objects").open("a") as file:
            file.write(f"{object_id}\n")


class Incoming:
    """All puts under way in a store. Every method needs the store's lock."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, cache: Cache, run_id: str) -> Arrival:
        """Begin a put. Drafts of killed ones are removed, and all of those that were collected."""
        for dead in self._dead():
            for path in _inside(dead):
                if path.name not in KEPT:
                    path.unlink(missing_ok=True)
            if not (dead / "run").exists():
                shutil.rmtree(dead, ignore_errors=True)
        return Arrival(self.folder / uuid.uuid4().hex, cache, run_id)

    def leftovers(self, live: Collection[str]) -> list[Path]:
        """The files of killed puts whose runs are not under way."""
        return [path for dead in self._dead() if _run(dead) not in live for path in _inside(dead) if path.name != "lock"]

    def objects(self, live: Collection[str]) -> set[str]:
        """The ids of the objects that puts under way, and killed ones of runs that are under way, rely on."""
        dead = {folder for folder in self._dead() if _run(folder) not in live}
        return {line for path in self.folder.glob("*/objects") if path.parent not in dead for line in path.read_text().split()}

    def _dead(self) -> list[Path]:
        found = []
        for folder in self.folder.glob("*"):
            with suppress(filelock.Timeout), filelock.FileLock(folder / "lock", timeout=0):
                found.append(folder)
        return found


def _run(folder: Path) -> str:
    """The run a put belongs to; none where it was killed before it said so."""
    return (folder / "run").read_text() if (folder / "run").exists() else ""


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
