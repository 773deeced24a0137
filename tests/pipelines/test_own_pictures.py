"""A small manifest of one's own: one task, photographs only, labels of people, no known perfect edit anywhere. It ends in a release."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from infra.workspace import Workspace
from models.records import Candidate, read_rows
from ops.gate import evidence_for
from tests.models.tiny_clip import save_tiny_clip
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


def truth(folder: Path, preset: Path) -> Path:
    """The same preset, but one that asks for ground truth."""
    path = folder / "truth.yaml"
    path.write_text(yaml.safe_dump({"extends": str(preset), "evaluation": {"evidence": "ground_truth"}}))
    return path


def test_one_task_on_photographs_alone_ends_in_a_release_under_blind_evidence(
    onereward: Command, home: Path, toy: Callable[..., Path], tmp_path: Path
) -> None:
    models = yaml.safe_load(toy().read_text())["models"]
    preset = str(
        toy(
            models={**models, "clip": str(save_tiny_clip(tmp_path / "clip")), "second_judge": models["judge"]},
            source_images={"path": str(manifest(tmp_path / "own", 24))},
            preferences={"scripted": False},
            auto_promote=False,
            evaluation={"evidence": "blind", "tie_tolerance": 0.99},  # random weights beat nobody: ties have a bound above zero
        )
    )
    code, _, err = onereward("run", "--preset", preset)
    assert code == 1 and "preferences: There is no label for these candidates." in err
    workspace = Workspace.from_env(home)
    candidates = workspace.store.get(workspace.store.versions("candidates")[-1].ref)
    assert onereward("labels", "import", str(labels(tmp_path, candidates)))[0] == 0

    code, out, err = onereward("run", "--preset", preset)
    assert code == 0, out + err
    assert "refused: " not in out and len(workspace.store.versions("release")) == 1

    facts = json.loads((workspace.reports / "2" / "report.json").read_text())
    assert facts["not_evaluated"] == ["fill", "text", "extend", "extend_free"] and facts["evidence"] == "blind"
    assert facts["policy"]["static"]["tasks"][-1]["n"] > 0 and facts["policy"]["static"]["tasks"][-1]["n_without_truth"] == 0
    assert facts["second_judge"]["base"]["static"]["n"] == facts["policy"]["static"]["tasks"][-1]["n"]
    asked = {gate["name"]: gate for gate in facts["gates"]}
    assert asked["ground_truth"]["passed"] and "not asked under `evidence: blind`" in asked["ground_truth"]["description"]
    assert all(asked[name]["measure"] is not None for name in ("win_rate", "win_rate_lo", "task_lo", "hacked_cells", "confirming_lo"))
    page = (workspace.reports / "2" / "report.html").read_text()
    assert "Image fill, Text rendering, Image extend, Image extend without prompt. The mean leaves these tasks out." in page
    card = next(workspace.store.get(workspace.store.versions("release")[-1].ref).glob("README.md")).read_text()
    assert "by measures that need no target" in card
    release = workspace.store.versions("release")[-1].ref.digest
    code, _, err = onereward("promote", release, "staging", "--preset", str(truth(tmp_path, Path(preset))))
    assert code == 1 and "require_ground_truth False (True is in force)" in err
    assert onereward("promote", release, "staging", "--preset", preset)[0] == 0
    pairs = evidence_for(workspace.store, workspace.keys, workspace.store.versions("preference_pairs")[-1].ref)
    assert pairs is not None and pairs.passed
