"""The whole chain at toy size, through Dagster and the command line: promoted, unchanged, refused, interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from assets.sources import ROOT
from infra.stores.base import ArtifactStore
from infra.workspace import Workspace
from pipelines import load_released
from tests.pipelines.conftest import Command, Finished
from tests.pipelines.toy import write_toy

pytestmark = pytest.mark.chain
ARTIFACTS = {
    "source_images",
    "curated_dataset",
    "candidates",
    "preferences",
    "preference_pairs",
    "reward_model",
    "policy-static",
    "policy-ema",
    "evaluation",
    "onnx",
    "engine",
    "release",
}


def versions(store: ArtifactStore) -> set[str]:
    return {version.ref.name for version in store.versions() if not version.ref.name.startswith("gates-")}


def test_secrets_of_the_environment_are_nowhere_in_a_home(finished: Finished) -> None:
    """Not in records, tags, logs, Dagster's databases or reports; git's compressed objects are read through git."""
    assert finished.code == 0, finished.out + finished.err
    for git in (("log", "--all", "-p"), ("for-each-ref", "--format=%(contents)")):
        told = subprocess.run(["git", *git], cwd=finished.home / "registry", capture_output=True, check=True).stdout
        assert len(told) > 1000 and b"planted-" not in told
    files = [path for path in finished.home.rglob("*") if path.is_file()]
    assert len(files) > 100 and [path for path in files if b"planted-" in path.read_bytes()] == []
    assert "planted-" not in finished.out + finished.err
    private = finished.home / "keys" / "signing.key"
    key = private.read_text().splitlines()[1].encode()
    assert [path for path in files if key in path.read_bytes()] == [private]


def test_promoted_then_unchanged_then_refused(onereward: Command, home: Path, toy: Callable[..., Path], finished: Finished) -> None:
    assert finished.code == 0, finished.out + finished.err
    assert "promoted: release v1" in finished.out and finished.err == ""
    workspace = Workspace.from_env(finished.copy(home))
    assert versions(workspace.store) == ARTIFACTS
    production = workspace.store.stage("release", "production")
    assert production is not None

    facts = json.loads((workspace.reports / "1" / "report.json").read_text())
    assert facts["release"] == {"version": 1, "stage": "production", "digest": production.digest}
    assert facts["wall_s"] > 0 and 0 < facts["peak_rss_gb"] < 6 and 0 <= facts["overhead_share"] < 1
    assert set(facts["policy"]) == {"static", "ema"} and facts["engine"]["verified"] is False
    assert {"split_leak", "judge_accuracy", "policy_moved", "win_rate", "onnx_error", "engine_built"} <= {g["name"] for g in facts["gates"]}
    assert all(gate["passed"] for gate in facts["gates"])
    assert (workspace.reports / "1" / "report.html").stat().st_size > 10_000

    moves = workspace.store.moves("release")
    code, out, err = onereward("run", "--preset", str(toy()), "--require-promotion")
    assert code == 0, out + err
    assert f"everything reused: {len(ARTIFACTS)} artifacts unchanged" in out
    assert "unchanged: release v1" in out and "[release] nothing to do" in out
    assert Workspace.from_env(home).store.moves("release") == moves
    assert "candidate, staging, production verified" in onereward("versions", "release", "--verify")[1]
    assert "release v1" in onereward("report")[1]
    assert onereward("verify")[0] == 0
    assert type(load_released(home=home)).__name__ == "FluxFillCFGPipeline"

    # A judge that nothing satisfies: the chain stops at its gate, says so, and production does not move.
    strict = ("run", "--preset", str(toy(gates={"min_judge_accuracy": 1.0})))
    code, out, err = onereward(*strict)
    assert code == 0, out + err
    assert "refused: reward_model" in out and "judge_accuracy" in out
    assert onereward(*strict, "--require-promotion")[0] == 3
    store = Workspace.from_env(home).store
    assert store.moves("release") == moves
    facts = json.loads((workspace.reports / "3" / "report.json").read_text())
    assert facts["refused"].startswith("reward_model") and facts["release"] is None


def test_a_release_is_sampled_as_it_was_measured(
    onereward: Command, home: Path, toy: Callable[..., Path], finished: Finished, tmp_path: Path
) -> None:
    """Whatever preset it is edited under; the base as that preset is evaluated."""
    finished.copy(home)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "red").save(image)
    drawn = Image.new("L", (64, 64), 0)
    drawn.paste(255, (16, 16, 40, 48))
    drawn.save(mask)

    def edited(source: str, name: str, *more: str, **evaluation: float) -> bytes:
        out, request = tmp_path / name, ("--prompt", "x", "--from", source, "--preset", str(toy(evaluation=evaluation)))
        code, _, err = onereward("edit", str(image), str(mask), "--out", str(out), *request, *more)
        assert code == 0 and "does not say" not in err, err
        return Image.open(out).tobytes()

    other = {"steps": 3, "true_cfg": 3.0}
    assert edited("production", "as-measured.png") == edited("production", "elsewhere.png", **other)
    assert edited("production", "as-measured.png") != edited("production", "more-steps.png", "--steps", "3")
    assert edited("base", "base.png") != edited("base", "base-elsewhere.png", **other)


def test_cut_weights_end_a_run_in_one_line(onereward: Command, home: Path, finished: Finished, tiny_weights: Path, tmp_path: Path) -> None:
    """At the first stage that reads them: it makes its embeddings with the base's VAE."""
    shutil.copytree(tiny_weights / "flux", tmp_path / "flux")
    file = tmp_path / "flux" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    store, labels = Workspace.from_env(finished.copy(home)).store, home / "labels.db"
    before = store.versions(), store.moves("release"), labels.read_bytes()
    preset = write_toy(tmp_path, tiny_weights, models={"flux": str(tmp_path / "flux")})
    code, _, err = onereward("run", "--preset", str(preset))
    assert code == 1 and err.startswith(f"error: curated_dataset: {file} is cut or altered: ") and err.count("\n") == 1
    assert "Download or make it again." in err
    assert (store.versions(), store.moves("release"), labels.read_bytes()) == before


def test_ctrl_c_ends_with_130_and_keeps_finished_stages(home: Path, toy: Callable[..., Path]) -> None:
    preset = str(toy(reward_model={"steps": 100_000, "patience": 100_000}))
    environment = {**os.environ, "ONEREWARD_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipelines.cli", "run", "--preset", preset]
    # A shell starts background jobs, such as these tests, deaf to Ctrl-C, and children inherit it.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=hears, **pipes) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "fit_reward" in line:
                break
        else:
            raise AssertionError("".join(said))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Ctrl-C" in errors and "Traceback" not in errors
    store = Workspace.from_env(home).store
    assert versions(store) == {"source_images", "curated_dataset", "candidates", "preferences", "preference_pairs"}
    assert list((home / "tmp").iterdir()) == []
