"""DVC's cache: one read-only file per content, named by its MD5, and one list per directory.

    cache.take(draft, md5)          # a draft becomes an object, atomically
    cache.link(files, folder)       # hard links: no bytes are copied
    damaged = cache.assemble(files, folder, progress)

Written here and not by `dvc add`, which would read every file again for its MD5; the layout is DVC's, and `dvc status`,
`dvc get` and `dvc push` read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from infra.progress import Progress
from infra.stores.content import CHUNK, StoredFile, hash_files, metered

NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


class Cache:
    """The objects below `folder`, which is DVC's `<cache>/files/md5`. Safe to use from several processes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, object_id: str) -> Path:
        return self.folder / object_id[:2] / object_id[2:]

    def objects(self) -> Iterator[tuple[str, Path]]:
        """Every object's id and file."""
        for path in self.folder.glob("??/*"):
            yield path.parent.name + path.name, path

    def has(self, file: StoredFile) -> bool:
        """Whether a file's object is there at its full length."""
        try:
            return self.path(file.md5).stat().st_size == file.size
        except OSError:
            return False

    def take(self, draft: Path, object_id: str) -> bool:
        """Make `draft` the object of that id. One that is there already and intact stays, as others link to it: then False."""
        target = self.path(object_id)
        if target.exists() and _md5(target) == object_id.removesuffix(".dir"):
            draft.unlink()
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.chmod(0o444)
        os.replace(draft, target)
        return True

    def link(self, files: Iterable[StoredFile], folder: Path) -> list[StoredFile]:
        """Put files at `folder`, read-only; those whose objects are not there are left out and returned."""
        missing = []
        made = set()
        for file in files:
            target = folder / file.path
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            try:
                os.link(self.path(file.md5), target)
            except FileNotFoundError:
                missing.append(file)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                shutil.copyfile(self.path(file.md5), target)
                target.chmod(0o444)
        return missing

    def assemble(self, files: list[StoredFile], folder: Path, progress: Progress | None) -> list[StoredFile]:
        """Link files at `folder`, which is made anew, and read them: those that are absent or hash to something else."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        missing = self.link(files, folder)
        there = [file for file in files if file not in missing]
        with metered(progress, "verify", sum(file.size for file in there)) as meter:
            hashes = hash_files((folder / file.path for file in there), meter)
        return [*missing, *(file for file, sha256 in zip(there, hashes, strict=True) if file.sha256 != sha256)]


def list_of(files: Iterable[StoredFile]) -> tuple[str, bytes]:
    """The list of a directory's files, as dvc_data's `Tree` writes it, and its id."""
    entries = sorted(({"md5": file.md5, "relpath": file.path} for file in files), key=lambda each: each["relpath"])
    content = json.dumps(entries, sort_keys=True).encode()
    return f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir", content


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            md5.update(chunk)
    return md5.hexdigest()
