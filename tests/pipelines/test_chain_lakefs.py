"""The whole chain at toy size with lakeFS as its store: the stand-in, with the hook on `main` and bytes going beside the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.workspace import Workspace
from tests.infra.lakefs_server import LakeFS
from tests.pipelines.conftest import Command
from tests.pipelines.test_chain import ARTIFACTS, versions

pytestmark = pytest.mark.chain


def test_the_chain_runs_and_promotes_on_lakefs(
    onereward: Command, home: Path, toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LakeFS(presign=True, multipart=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        code, out, err = onereward("run", "--preset", str(toy(store="lakefs://onereward")))
        assert code == 0, out + err
        assert "promoted: release v1" in out
        workspace = Workspace.from_env(home)
        assert workspace.where == "lakefs://onereward" and not (home / "registry").exists()
        assert versions(workspace.store) == ARTIFACTS
        production = workspace.store.stage("release", "production")
        assert production is not None and workspace.store.moves("release")[-1].digest == production.digest
        assert "candidate, staging, production verified" in onereward("versions", "release", "--verify")[1]

        repo = server.repositories["onereward"]
        held = {path.split("/")[1] for path in repo.tree("main")}
        assert held == {version.ref.name for version in workspace.store.lineage(production.digest)} | {"evidence.yaml"}
        runs = {branch for branch in repo.branches if branch not in ("main", "audit")}
        assert len(runs) == 1 and runs.pop().startswith("run-")
