"""`onereward doctor`: what is wrong is found, said with its figure, and given a remedy."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from infra.workspace import Workspace
from pipelines import doctor
from pipelines.config import load_settings
from pipelines.doctor import Finding
from tests.infra.lakefs_server import LakeFS
from tests.pipelines.conftest import Command

NAMES = [
    *("cores", "memory", "disk", "GPU", "ONNX Runtime", "engine builder", "weights", "guidance"),
    *("store", "labels", "signing key", "lakeFS", "antlr"),
]
Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def examine(home: Path, toy: Callable[..., Path]) -> Examine:
    """`examine(threads=2)` looks at everything under a toy preset with changed sections; findings by name."""

    def call(**sections: Any) -> dict[str, Finding]:
        return {finding.name: finding for finding in doctor.examine(load_settings(str(toy(**sections))), Workspace.from_env(home))}

    return call


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed({"onnxruntime": "1.31"})` makes the packages named have those versions, None for absent."""

    def pretend(versions: dict[str, str | None]) -> None:
        real = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda package: versions[package] if package in versions else real(package))

    return pretend


def test_everything_is_looked_at_and_a_remedy_follows_what_is_not_ok(onereward: Command, toy: Callable[..., Path]) -> None:
    code, out, _ = onereward("doctor", "--preset", str(toy()))
    lines = out.splitlines()
    found = [line for line in lines if not line.startswith(" ")]
    assert [line[9:24].strip() for line in found] == NAMES
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith(" ") or following.lstrip().startswith("-> ") == (not line.startswith("ok "))
    assert code == int(any(line.startswith("error ") for line in found))


def test_too_few_cores(examine: Examine) -> None:
    finding = examine(threads=4096)["cores"]
    assert finding.level == "warning" and "4096 threads" in finding.found and "Set `threads: " in finding.remedy


def test_checkpoints_looked_at_otherwise_than_measured(examine: Examine, onereward: Command, tmp_path: Path) -> None:
    preset = tmp_path / "stronger.yaml"
    preset.write_text("extends: mini\nevaluation:\n  true_cfg: 4\n  negative_prompt: blurred\n")
    _, out, _ = onereward("doctor", "--preset", str(preset))
    said = out[out.index("guidance") :].splitlines()
    assert "policy.watch_true_cfg is 3.0, the evaluation's 4.0; policy.negative_prompt is '', the evaluation's 'blurred'" in said[0]
    assert "watch_true_cfg: 4.0, negative_prompt: 'blurred'" in said[1]
    unguided: dict[str, Any] = {"policy": {"watch_true_cfg": 1, "negative_prompt": "x"}, "evaluation": {"true_cfg": 1}}
    assert examine(**unguided)["guidance"].level == "ok"  # a negative prompt says nothing without guidance
    finding = examine(policy={"guidance_scale": 30}, evaluation={"guidance_scale": 1})["guidance"]
    assert finding.level == "warning" and "guidance_scale: 1.0 (of the training too" in finding.remedy


def test_little_memory(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.5e9))
    finding = examine()["memory"]
    assert finding.level == "warning" and finding.found.startswith("1.5 GB free") and "batch sizes" in finding.remedy


def test_little_disk(examine: Examine, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=0.7e9)

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    finding = examine()["disk"]
    assert asked == [home.parent]  # the home's disk, also before there is a home
    assert finding.level == "warning" and finding.found.startswith("0.7 GB free") and "ONEREWARD_HOME" in finding.remedy


@pytest.mark.parametrize("absent", [("tensorrt", "tensorrt_rtx_bindings"), ("onnxruntime",)])
def test_no_engine_builder(examine: Examine, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]) -> None:
    for module in ("ops.build_engine", "ops.export_onnx"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in absent:
        monkeypatch.setitem(sys.modules, module, None)
    finding = examine()["engine builder"]
    assert finding.level == "error" and ("TensorRT" in finding.found or "onnxruntime" in finding.found) and "cpu" in finding.remedy


@pytest.mark.parametrize(
    ("versions", "found", "remedy"),
    [
        ({"onnxruntime": None, "onnxruntime-gpu": None}, "not installed", "pip install -e"),
        ({"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}, "both installed", "pip uninstall -y onnxruntime onnxruntime-gpu"),
    ],
)
def test_onnx_runtime_absent_or_twice(
    examine: Examine, installed: Callable[..., None], versions: dict[str, str | None], found: str, remedy: str
) -> None:
    installed(versions)
    finding = examine()["ONNX Runtime"]
    assert finding.level == "error" and found in finding.found and remedy in finding.remedy


@pytest.mark.parametrize(("version", "level"), [("4.9.3", "warning"), (None, "warning"), ("4.13.2", "ok")])
def test_the_antlr_trap(examine: Examine, installed: Callable[..., None], version: str | None, level: str) -> None:
    installed({"antlr4-python3-runtime": version})
    finding = examine()["antlr"]
    assert finding.level == level
    if level != "ok":
        assert "selection strings crash" in finding.found and "antlr4-python3-runtime==4.13.2" in finding.remedy


def test_weights_that_are_not_there(examine: Examine) -> None:
    finding = examine(models={"flux": "nowhere/flux", "judge": "nowhere/judge"})["weights"]
    assert finding.level == "warning" and "nowhere/flux, nowhere/judge" in finding.found and "dvc pull" in finding.remedy


def test_a_registry_that_is_something_else(examine: Examine, home: Path) -> None:
    (home / "registry").mkdir(parents=True)
    (home / "registry" / ".git").write_text("gitdir: /nowhere\n")
    finding = examine()["store"]
    assert finding.level == "error" and str(home / "registry") in finding.found and finding.remedy


@pytest.mark.parametrize("url", ["labels.db", "nosuch://host/labels", "sqlite:///{folder}"])
def test_a_label_database_that_cannot_be_used(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ONEREWARD_LABELS_URL", url.format(folder=tmp_path))
    finding = examine()["labels"]
    assert finding.level == "error" and "label database" in finding.found and finding.remedy


@pytest.mark.parametrize("endpoint", ["lakefs.example.com:8000", "http://", "http://127.0.0.1:port", "http://[::1", "http://a b/"])
def test_a_malformed_endpoint(examine: Examine, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("LAKEFS_ENDPOINT", endpoint)
    finding = examine()["lakeFS"]
    assert finding.level == "error" and endpoint in finding.found and "LAKEFS_ENDPOINT" in finding.remedy


@pytest.fixture
def mute() -> Iterator[str]:
    """URL of a port at which nothing answers: it is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_an_endpoint_that_does_not_answer(examine: Examine, monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    for name in ("LAKEFS_ENDPOINT", "LAKEFS_ACCESS_KEY_ID", "LAKEFS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, mute)
    finding = examine()["lakeFS"]
    assert finding.level == "error" and f"{mute} does not answer" in finding.found and "Start the server" in finding.remedy


def test_a_lakefs_server_its_credentials_and_the_repository(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    with LakeFS() as server:
        monkeypatch.setenv("LAKEFS_ENDPOINT", server.endpoint)
        monkeypatch.delenv("LAKEFS_ACCESS_KEY_ID", raising=False)
        finding = examine()["lakeFS"]
        assert finding.level == "error" and "LAKEFS_ACCESS_KEY_ID is not set" in finding.found and finding.remedy
        for name, value in (server.environment | {"LAKEFS_SECRET_ACCESS_KEY": "expired"}).items():
            monkeypatch.setenv(name, value)
        finding = examine()["lakeFS"]
        assert finding.level == "error" and "401" in finding.found and "expired" in finding.remedy and "expired" not in finding.found
        monkeypatch.setenv("LAKEFS_SECRET_ACCESS_KEY", server.environment["LAKEFS_SECRET_ACCESS_KEY"])
        assert "not the store" in examine()["lakeFS"].found
        monkeypatch.setenv("ONEREWARD_STORE", "lakefs://onereward")
        finding = examine()["lakeFS"]
        assert finding.level == "ok" and "will be made in mem://onereward" in finding.found and not server.repositories
        server.add_repository("onereward", protected=True)
        assert "main protected" in examine()["lakeFS"].found


def test_a_signing_key_that_others_may_read_is_seen(examine: Examine, home: Path) -> None:
    assert "makes a pair" in examine()["signing key"].found
    keys = Workspace.from_env(home).keys
    keys.create()
    assert examine()["signing key"].level == "ok"
    keys.private.chmod(0o644)
    assert examine()["signing key"].level == "warning" and "chmod 600" in examine()["signing key"].remedy
