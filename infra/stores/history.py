"""The git side of a registry: one commit per version, stage moves as annotated tags, and the way back to the last commit.

    history = History(root)
    history.commit({"records/onnx/000001.json": b"..."}, "onnx 1")
    history.tag("onnx#production#1", history.introduced("records/onnx/000001.json"), "...")

Written through libgit2, not the git program: a user's hooks, commit signing and templates do not apply, and a commit costs
a few milliseconds. A repository is opened per call, so another process's commits are always seen.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pygit2
from pygit2.enums import FileMode, ObjectType, ResetMode, SortMode

from models.errors import StoreError

NAME, EMAIL = "OneReward Pipeline", "onereward@localhost"
SPARE_BYTES = 64 * 1024  # ours: with less free than this, a failed write has failed for want of space


class History:
    """The commits and tags of the git repository at `root`."""

    def __init__(self, root: Path):
        self.root = root

    def exists(self) -> bool:
        """Whether there is a repository with at least one commit."""
        return (self.root / ".git").is_dir() and not self._open().head_is_unborn

    def create(self) -> None:
        """Make an empty repository with an identity of its own."""
        repo = pygit2.init_repository(str(self.root), initial_head="main")
        repo.config["user.name"] = NAME
        repo.config["user.email"] = EMAIL
        repo.config["commit.gpgsign"] = "false"

    def commit(self, files: dict[str, bytes], message: str) -> None:
        """Commit `files` (path in the repository -> content) as one commit, then write them to the working tree.

        A file appears in the working tree only after its commit: who reads plain files never sees what may be rolled back.
        """
        repo = self._open()
        index = repo.index
        with self._space():
            for path, content in files.items():
                index.add(pygit2.IndexEntry(path, repo.create_blob(content), FileMode.BLOB))
            author = pygit2.Signature(NAME, EMAIL)
            parents = [] if repo.head_is_unborn else [repo.head.target]
            repo.create_commit("HEAD", author, author, message, index.write_tree(), parents)
            index.write()
        for path, content in files.items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.write_bytes(content)
            os.replace(part, target)

    def reset(self) -> None:
        """Bring the working tree back to the last commit and remove files that git neither knows nor ignores.

        Locks left by a killed process are removed: the caller holds the store's lock, so nobody else is writing.
        """
        for lock in (self.root / ".git").rglob("*.lock"):
            lock.unlink()
        repo = self._open()
        repo.reset(repo.head.target, ResetMode.HARD)
        for path in repo.status(untracked_files="all"):
            (self.root / path).unlink()

    def files(self, folder: str) -> list[bytes]:
        """The contents of every file below `folder` in the last commit."""
        repo = self._open()
        tree = repo.head.peel(pygit2.Tree)
        if folder not in tree:
            return []
        open_: list[pygit2.Object] = [tree[folder]]
        found = []
        while open_:
            item = open_.pop()
            if isinstance(item, pygit2.Tree):
                open_ += item
            elif isinstance(item, pygit2.Blob):
                found.append(item.data)
        return found

    def introduced(self, path: str, subject: str = "") -> str:
        """The commit that brought `path`, as hex; it is among those whose message begins with `subject`, which saves looking into all.

        Raises StoreError when no commit did.
        """
        repo = self._open()
        for commit in repo.walk(repo.head.target, SortMode.TOPOLOGICAL):
            if commit.message.startswith(subject) and path in commit.tree and not any(path in parent.tree for parent in commit.parents):
                return str(commit.id)
        raise StoreError(f"No commit in {self.root} brought {path}.", "The registry's history was altered; restore it from a backup.")

    def tag(self, tag: str, commit: str, message: str) -> None:
        """Make an annotated tag on a commit, a second later than every other: GTO goes by these times, which are whole seconds."""
        repo = self._open()
        when = max([int(time.time()), *(each.tagger.time + 1 for _, each in self._tags(repo, "") if each.tagger)])
        with self._space():
            repo.create_tag(tag, commit, ObjectType.COMMIT, pygit2.Signature(NAME, EMAIL, when), message)

    def tags(self, prefix: str) -> dict[str, str]:
        """Annotated tags that begin with `prefix`: name -> message."""
        return {name: tag.message for name, tag in self._tags(self._open(), prefix)}

    def _tags(self, repo: pygit2.Repository, prefix: str) -> Iterator[tuple[str, pygit2.Tag]]:
        for name in repo.references:
            if name.startswith(f"refs/tags/{prefix}"):
                tag = repo[repo.references[name].target]
                if isinstance(tag, pygit2.Tag):
                    yield name.removeprefix("refs/tags/"), tag

    @contextmanager
    def _space(self) -> Iterator[None]:
        """A full disk is told as OSError: libgit2 does not always say why it could not write."""
        try:
            yield
        except pygit2.GitError as error:
            if shutil.disk_usage(self.root).free < SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root)) from error
            raise

    def _open(self) -> pygit2.Repository:
        return pygit2.Repository(str(self.root))
