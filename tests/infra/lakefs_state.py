"""What the lakeFS stand-in (tests/infra/lakefs_server.py) keeps: repositories with branches, commits, tags and their objects."""

from __future__ import annotations

import fnmatch
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import lakefs_sdk as api
import yaml

Tree = dict[str, api.ObjectStats]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


@dataclass
class Commit:
    id: str
    parents: tuple[str, ...]
    tree: Tree
    message: str
    metadata: dict[str, str]
    created: int


@dataclass
class Branch:
    head: str
    staged: Tree = field(default_factory=dict)  # uploaded and not committed


@dataclass
class Repository:
    name: str
    namespace: str
    created: int
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Branch] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)

    def add(self, parents: tuple[str, ...], tree: Tree, message: str, metadata: dict[str, str] | None, created: int) -> Commit:
        commit = Commit(secrets.token_hex(32), parents, tree, message, metadata or {}, created)
        self.commits[commit.id] = commit
        return commit

    def ancestors(self, id: str) -> list[str]:
        """The commit and what is before it, nearest first."""
        found = {id: None}
        queue = [id]
        for each in queue:
            new = [parent for parent in self.commits[each].parents if parent not in found]
            found.update(dict.fromkeys(new))
            queue.extend(new)
        return list(found)

    def branch(self, name: str, write: bool = False) -> Branch:
        if name not in self.branches:
            raise Refused(404, f"branch {name} not found")
        if write and any(fnmatch.fnmatch(name, pattern) for pattern in self.protected):
            raise Refused(403, "cannot write to protected branch")
        return self.branches[name]

    def commit_of(self, ref: str) -> Commit:
        if ref in self.branches:
            return self.commits[self.branches[ref].head]
        id = self.tags.get(ref, ref)
        if id in self.commits:
            return self.commits[id]
        found = [commit for commit in self.commits if commit.startswith(id)] if len(id) >= 6 else []
        if len(found) != 1:
            raise Refused(404, f"reference {ref} not found")
        return self.commits[found[0]]

    def tree(self, ref: str) -> Tree:
        staged = self.branches[ref].staged if ref in self.branches else {}
        return self.commit_of(ref).tree | staged

    def object(self, ref: str, path: str) -> api.ObjectStats:
        tree = self.tree(ref)
        if path not in tree:
            raise Refused(404, f"{path} not found")
        return tree[path]

    def merged(self, source: Commit, into: Branch, wanted: api.Merge) -> Tree:
        """The objects of a three-way merge."""
        if into.staged:
            raise Refused(400, "uncommitted changes (dirty branch)")
        destination = self.commits[into.head]
        known = set(self.ancestors(destination.id))
        base = self.commits[next(id for id in self.ancestors(source.id) if id in known)].tree
        tree: dict[str, api.ObjectStats | None] = dict(destination.tree)
        for path in base.keys() | source.tree.keys():
            old, new, there = (_identity(each.get(path)) for each in (base, source.tree, destination.tree))
            if new in (old, there):
                continue
            if old != there and wanted.strategy is None:
                raise Refused(409, "Conflict")
            if old == there or wanted.strategy == "source-wins":
                tree[path] = source.tree.get(path)
        merged = {path: stats for path, stats in tree.items() if stats is not None}
        if merged == destination.tree and not wanted.allow_empty and not wanted.force:
            raise Refused(400, "no changes")
        return merged

    def check_actions(self, source: Commit, branch: str, metadata: dict[str, str] | None, read: Callable[[str], bytes]) -> None:
        """Pre-merge actions lie in the merge's source; of their hooks only the metadata they demand is looked at."""
        for path, stats in source.tree.items():
            if not path.startswith("_lakefs_actions/"):
                continue
            action = yaml.load(read(stats.physical_address), yaml.BaseLoader)
            if branch not in action["on"].get("pre-merge", {}).get("branches", []):
                continue
            for hook in action["hooks"]:
                for key, rule in hook["properties"]["args"].items():
                    if not re.search(rule["pattern"], (metadata or {}).get(key, "")):
                        raise Refused(412, f"pre-merge hook aborted: {action['name']}: {hook['id']}: {key}")


def _identity(stats: api.ObjectStats | None) -> object:
    return stats and (stats.checksum, stats.size_bytes, tuple(sorted((stats.metadata or {}).items())))
