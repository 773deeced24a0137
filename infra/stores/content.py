"""A folder's files and what they hash to, read once: SHA-256 for the artifact's digest, MD5 for the names in DVC's cache.

    found = walk(folder)                                # path -> FileStat
    sha256, md5 = copy_hashed(source, target, meter)    # one reading: both hashes and the copy

hashlib releases the interpreter's lock, so files, and the two hashes of one file, are worked on at once. No file is held in
memory whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from infra.progress import Bar, Progress
from models.errors import StoreError

CHUNK = 4 * 2**20  # ours: bytes held in memory of each file that is being read
WORKERS = min(4, os.cpu_count() or 1)  # ours: files worked on at once
MB = 10**6
# ours: a file changed this shortly before it was read may change again without its times telling, clocks being coarse
UNSETTLED_NS = 100 * 10**6
REMEMBERED_S = 7 * 86_400  # ours: how long the hashes of a folder that is not put again are kept

T = TypeVar("T")
R = TypeVar("R")


class FileStat(NamedTuple):
    """What tells that a file has not changed. The kernel alone sets `ctime_ns`; another link to the file changes it too."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @property
    def content(self) -> tuple[int, int, int]:
        """What changes with the file's bytes alone."""
        return self[:3]


@dataclass(frozen=True)
class StoredFile:
    """One file of an artifact."""

    path: str  # relative, with forward slashes
    size: int  # bytes
    sha256: str
    md5: str


class GivenUp(Exception):
    """Another file of the same work failed."""


class Meter:
    """Bytes done by several threads, told to one bar in MB."""

    def __init__(self, bar: Bar):
        self._bar, self._rest, self._lock = bar, 0, threading.Lock()
        self.stopped = False

    def add(self, count: int) -> None:
        """Raises GivenUp in the threads of work that was given up."""
        if self.stopped:
            raise GivenUp
        with self._lock:
            megabytes, self._rest = divmod(self._rest + count, MB)
            if megabytes:
                self._bar.advance(megabytes)


@contextmanager
def metered(progress: Progress | None, label: str, total: int) -> Iterator[Meter]:
    """A meter to `total` bytes."""
    with (progress or Progress()).bar(label, total=total // MB, unit="MB") as bar:
        yield Meter(bar)


def walk(folder: Path) -> dict[str, FileStat]:
    """Every file below `folder`, in the order of the digest. Raises StoreError for one that is absent, empty or holds links."""
    found = {}
    for top, folders, files in os.walk(folder, onerror=_raise) if folder.is_dir() else ():
        below = "" if top == str(folder) else f"{os.path.relpath(top, folder)}/"
        for name in (*folders, *files):
            path = os.path.join(top, name)
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                raise StoreError(f"{path} is a symbolic link.", "An artifact holds its own bytes: put the file itself there.")
            if stat.S_ISREG(info.st_mode):
                found[below + name] = FileStat(info.st_size, info.st_mtime_ns, info.st_ino, info.st_ctime_ns)
            elif not stat.S_ISDIR(info.st_mode):
                raise StoreError(f"{path} is no plain file.", "An artifact holds files and folders alone.")
    if not found:
        raise StoreError(f"{folder} is no folder with files in it.", "An artifact is a folder that holds at least one file.")
    return {path: found[path] for path in sorted(found, key=_order)}


def _raise(error: OSError) -> None:
    raise error


def _order(path: str) -> list[str]:
    return path.split("/")


def digest_of(files: Iterable[tuple[str, str]]) -> str:
    """The digest of (relative path, SHA-256) pairs, whatever their order."""
    lines = (f"{path} {sha256}\n" for path, sha256 in sorted(files, key=lambda each: _order(each[0])))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def in_parallel(work: Callable[[T], R], items: Iterable[T], meter: Meter) -> list[R]:
    """`work` of each item by several threads. The first failure, or Ctrl-C, ends them all."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [each.result() for each in futures]
        except BaseException:
            meter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def hash_files(paths: Iterable[Path], meter: Meter) -> list[str]:
    """The SHA-256 of each file, hex."""

    def read(path: Path) -> str:
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                sha256.update(buffer[:count])
                meter.add(count)
        return sha256.hexdigest()

    return in_parallel(read, paths, meter)


def copy_hashed(source: Path, target: Path, meter: Meter, hashers: ThreadPoolExecutor) -> tuple[str, str]:
    """Copy a file's bytes; its SHA-256 and MD5, hex, of exactly what was written."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    buffer = memoryview(bytearray(min(CHUNK, source.stat().st_size + 1)))
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            chunk = buffer[:count]
            hashing = [hashers.submit(each.update, chunk) for each in (sha256, md5)]
            try:
                written = 0
                while written < count:
                    written += writer.write(chunk[written:])
            finally:
                wait(hashing)
            meter.add(count)
    return sha256.hexdigest(), md5.hexdigest()


class Remembered:
    """The hashes of a folder's files from when it was read last, where no file's stat has changed since: one file of JSON lines."""

    def __init__(self, memory: Path, folder: Path, found: dict[str, FileStat]):
        self._memory = memory
        self._path = memory / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.jsonl"
        self.found = found
        self._lock = threading.Lock()
        self._started = time.time_ns()
        self._begun = False
        self.files: dict[str, StoredFile] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                stat_then, fields = json.loads(line)
                known = StoredFile(**fields)
            except (ValueError, TypeError):
                continue  # its writer was killed in the middle of it
            if found.get(known.path) == tuple(stat_then):
                self.files[known.path] = known
        self._valid = list(self.files.values())

    def add(self, file: StoredFile) -> None:
        """Remember a file that was read, unless it was changed just now. Thread-safe."""
        self.files[file.path] = file
        if max(self.found[file.path].mtime_ns, self.found[file.path].ctime_ns) > self._started - UNSETTLED_NS:
            return
        with self._lock:
            if not self._begun:
                self._begin()
            self._write("a", [file])

    def _begin(self) -> None:
        self._begun = True
        self._memory.mkdir(parents=True, exist_ok=True)
        for path in self._memory.iterdir():
            if path.stat().st_mtime < time.time() - REMEMBERED_S:
                path.unlink(missing_ok=True)
        self._write("w", self._valid)

    def _write(self, mode: str, files: Iterable[StoredFile]) -> None:
        with self._path.open(mode) as memory:
            memory.writelines(json.dumps([self.found[file.path], asdict(file)]) + "\n" for file in files)
