"""Homes and presets for the tests of the top floor: every test has its own home, the tiny weights are made once."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import filelock
import pytest

from pipelines import cli
from tests.pipelines.toy import write_toy

VARIABLES = (
    "ONEREWARD_HOME",
    "DAGSTER_HOME",
    "ONEREWARD_PRESET",
    "ONEREWARD_STORE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)
PLANTED = {  # secrets that a run may find in its environment, and must leave there
    "ONEREWARD_WEBHOOK_SECRET": "planted-webhook-8d1f",
    "AWS_SECRET_ACCESS_KEY": "planted-object-store-8d1f",
    "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY": "planted-lakefs-8d1f",
    "HF_TOKEN": "planted-hub-8d1f",
}
Command = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_toy(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; presets and homes chosen in the test do not leak out of it."""
    folder = tmp_path / "home"
    _clear(monkeypatch)
    monkeypatch.setenv("ONEREWARD_HOME", str(folder))
    return folder


def _clear(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        environment.setenv(name, "")  # restored afterwards, whatever the command sets
        environment.delenv(name)


@dataclass(frozen=True)
class Finished:
    """A home after its first `onereward run` of the toy chain, and what that said. Copy the home before you change anything in it."""

    home: Path
    preset: Path
    code: int
    out: str
    err: str

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.home, target, symlinks=True)
        (target / "dagster" / "dagster.yaml").unlink()  # it names the folder it was written for, and is written again
        return target


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Finished:
    """The toy chain, once for all tests that start where it ended, those of other test processes too."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the processes share
    folder, told = folder / "finished", folder / "finished.json"
    with filelock.FileLock(told.with_suffix(".lock")):
        if not told.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            told.write_text(json.dumps(_ran(folder / "home", write_toy(folder, tiny_weights))))
    code, out, err, preset = json.loads(told.read_text())
    return Finished(folder / "home", Path(preset), code, out, err)


def _ran(home: Path, preset: Path) -> tuple[int, str, str, str]:
    """Exit code, stdout and stderr of `onereward run` in an environment with secrets, and its preset."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        _clear(patched)
        for name, secret in PLANTED.items():
            patched.setenv(name, secret)
        patched.setattr("sys.argv", ["onereward", "run", "--preset", str(preset), "--home", str(home)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue(), str(preset)


@pytest.fixture
def toy(tmp_path: Path, tiny_weights: Path) -> Any:
    """`toy(gates={...})` writes a toy preset with changed sections and returns its path."""

    def write(**sections: Any) -> Path:
        return write_toy(tmp_path, tiny_weights, **sections)

    return write


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


@pytest.fixture
def onereward(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["onereward", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
