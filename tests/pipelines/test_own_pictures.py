"""A small manifest of one's own: one task, photographs only, labels of people. The chain runs up to the gate that asks for ground truth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.workspace import Workspace
from models.records import Candidate, read_rows
from ops.gate import evidence_for
from tests.pipelines.conftest import Command

pytestmark = pytest.mark.chain


def manifest(folder: Path, count: int) -> Path:
    """Pictures of coloured patches, each with a mask around what is to be removed."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        patches.resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{number}.png")
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (16, 16, 40, 48))
        mask.save(folder / f"{number}.mask.png")
        lines.append({"image": f"{number}.png", "mask": f"{number}.mask.png", "task": "remove"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def labels(folder: Path, candidates: Path) -> Path:
    """What somebody answered who looked at every condition: any of the four is the best, any other the worst."""
    rows = read_rows(candidates / "candidates.jsonl", Candidate)
    coin, lines = random.Random(0), []
    for condition in dict.fromkeys(row.condition_id for row in rows):
        shown = [row.id for row in rows if row.condition_id == condition]
        best, worst = coin.sample(shown, 2)
        answer = {"removal_quality": {"best": best, "worst": worst}}
        lines.append({"condition_id": condition, "annotator": "kim", "shown": shown, "labels": answer})
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_task_on_photographs_alone_ends_at_ground_truth(
    onereward: Command, home: Path, toy: Callable[..., Path], tmp_path: Path
) -> None:
    preset = str(toy(source_images={"path": str(manifest(tmp_path / "own", 24))}, preferences={"scripted": False}))
    code, _, err = onereward("run", "--preset", preset)
    assert code == 1 and "preferences: There is no label for these candidates." in err
    workspace = Workspace.from_env(home)
    candidates = workspace.store.get(workspace.store.versions("candidates")[-1].ref)
    assert onereward("labels", "import", str(labels(tmp_path, candidates)))[0] == 0

    code, out, err = onereward("run", "--preset", preset)
    assert code == 0, out + err
    ended = next(line for line in out.splitlines() if line.startswith("refused: "))
    assert ended.startswith("refused: evaluation: evaluation did not pass ground_truth: measured 1, threshold 0 (at most: ")
    assert "remove. Acceptance is measured by ground truth" in ended and ended.count("did not pass") == 1
    assert workspace.store.versions("release") == []

    facts = json.loads((workspace.reports / "2" / "report.json").read_text())
    assert facts["not_evaluated"] == ["fill", "text", "extend", "extend_free"]
    assert facts["photos"]["static"]["n"] == facts["policy"]["static"]["tasks"][-1]["n_without_truth"] > 0
    page = (workspace.reports / "2" / "report.html").read_text()
    assert "Image fill, Text rendering, Image extend, Image extend without prompt. The mean leaves these tasks out." in page
    pairs = evidence_for(workspace.store, workspace.keys, workspace.store.versions("preference_pairs")[-1].ref)
    assert pairs is not None and pairs.passed
