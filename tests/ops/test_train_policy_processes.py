"""Two processes train what one trains, and leave together. Started by the real `accelerate launch`, over gloo, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from infra.progress import Progress
from models.flux_fill.loading import load_transformer
from models.records import Condition, read_rows, write_rows
from models.taxonomy import Taxonomy
from ops.train_policy import TrainPolicyConfig, train_policy
from tests.ops.test_train_policy import QUICK, parts  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
LEAVE_S = 60  # a process left behind would wait for the others for half an hour

pytestmark = pytest.mark.launch


def _job(parts, folder: Path, mode: str, **changes) -> dict:  # noqa: F811
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    config = QUICK.model_copy(update=changes).model_dump()
    return {"parts": [str(p) for p in parts], "config": config, "mode": mode, "out": f"{folder}/out", "scratch": f"{folder}/scratch"}


def _launch(folder: Path, *jobs: dict) -> subprocess.Popen:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "tests.ops.launched_policy", str(folder / "jobs.json")],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches the launcher and its workers alike
        )


def _ended(launched: subprocess.Popen, seconds: float) -> int:
    """The launcher's exit code; fails where it or one of its workers is still there after `seconds`."""
    workers = psutil.Process(launched.pid).children(recursive=True)
    try:
        code = launched.wait(seconds)
        assert not psutil.wait_procs(workers, timeout=5)[1], "a worker was left behind"
        return code
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)


def _agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> bool:
    """Whether two runs went the same way from `base`, up to a hundredth of the way: Adam blows up the rounding of small gradients."""
    apart = sum(float((ours[name] - theirs[name]).pow(2).sum()) for name in base)
    way = sum(float((theirs[name] - base[name]).pow(2).sum()) for name in base)
    return apart**0.5 < 0.01 * way**0.5


def test_two_processes_train_what_one_trains(parts, tmp_path):  # noqa: F811
    whole = {"batch_size": 4, "keep_weight": 20.0, "true_cfg": 2.0}
    jobs = {
        "uneven": _job(parts, tmp_path / "uneven", "static", batch_size=3),
        "static": _job(parts, tmp_path / "static", "static", **whole),
        "ema": _job(parts, tmp_path / "ema", "ema", batch_size=4, lora_rank=2, decay=0.5),
    }
    assert _ended(_launch(tmp_path, *jobs.values()), 300) == 0, (tmp_path / "log").read_text()

    refusals = [(tmp_path / "uneven" / "out" / f"refused-{rank}.txt").read_text() for rank in range(2)]
    assert all("batch_size 3 does not split evenly over 2 processes" in text for text in refusals)
    for name in ("static", "ema"):
        first, second = (load_file(tmp_path / name / "scratch" / f"rank-{rank}.safetensors") for rank in range(2))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    base = load_transformer(parts[0]).state_dict()
    for name, job in jobs.items():
        if name == "uneven":
            continue
        alone = tmp_path / f"{name}-alone"
        alone.mkdir()
        config = TrainPolicyConfig(**job["config"])
        metrics = train_policy(config, *parts, alone, Progress(), Taxonomy.load(), mode=job["mode"], scratch=tmp_path / "scratch")
        together = Path(job["out"])
        assert {p.name for p in together.iterdir()} == {p.name for p in alone.iterdir()}
        found = json.loads((together / "metrics.json").read_text())
        assert found.keys() == metrics.keys() and found["preservation_psnr"] == pytest.approx(metrics["preservation_psnr"], abs=0.05)
        curves = [[json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()] for folder in (together, alone)]
        for ours, theirs in zip(*curves, strict=True):
            assert [ours[key] for key in ("step", "task", "stop")] == [theirs[key] for key in ("step", "task", "stop")]
            for key in ("loss", "reward", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (name, key)
        merged = [load_transformer(parts[0], folder).state_dict() for folder in (together, alone)]
        assert _agree(*merged, base), name


def test_what_one_process_cannot_read_ends_both(parts, tmp_path):  # noqa: F811
    """One of the two training pictures does not decode: its process fails, and the other does not wait for it."""
    curated = tmp_path / "curated"
    shutil.copytree(parts[2], curated)
    rows = read_rows(curated / "conditions.jsonl", Condition)
    chosen = [row for row in rows if row.task == "fill" and row.split == "train"][:2]
    write_rows(curated / "conditions.jsonl", chosen)
    with tarfile.open(curated / "images-00000.tar") as shard:
        start = shard.getmember(f"{chosen[0].id}.image.png").offset_data
    with (curated / "images-00000.tar").open("r+b") as file:
        file.seek(start)
        file.write(bytes(64))
    job = _job((*parts[:2], curated), tmp_path / "run", "static")
    assert _ended(_launch(tmp_path, job), LEAVE_S * 2) != 0
    assert f"{chosen[0].id}.image" in (tmp_path / "log").read_text()
    assert not list(Path(job["out"]).iterdir())


def test_ctrl_c_ends_both_and_the_run_goes_on_from_its_checkpoint(parts, tmp_path):  # noqa: F811
    """Stopped with two processes, finished by one."""
    job = _job(parts, tmp_path / "run", "static", iterations=24)
    launched, deadline = _launch(tmp_path, job), time.monotonic() + 300
    while not list(Path(job["scratch"]).glob("*/step-*")):
        assert launched.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(launched.pid, signal.SIGINT)
    assert _ended(launched, LEAVE_S) != 0
    out, lines = Path(job["out"]), []
    assert not list(out.iterdir())
    config = TrainPolicyConfig(**job["config"])
    train_policy(config, *parts, out, Progress(lines.append), Taxonomy.load(), mode="static", scratch=Path(job["scratch"]))
    assert "resumed after iteration" in lines[0]
    assert [json.loads(line)["step"] for line in (out / "curve.jsonl").read_text().splitlines()] == list(range(1, 25))
