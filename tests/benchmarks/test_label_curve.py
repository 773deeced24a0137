"""The label curve at toy size: more fits than one, the annotator's errors in the training labels alone, nothing fitted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import label_curve
from benchmarks.rows import rows
from infra.progress import Progress
from models.records import Pair, Preference, read_rows
from pipelines.config import load_settings
from tests.pipelines.toy import write_toy


def test_two_sizes_and_two_annotators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_curve, "commit", lambda: "c0ffee")
    settings = load_settings(str(write_toy(tmp_path)))
    data_folder, out, said = tmp_path / "data", tmp_path / "curve.json", []
    data_folder.mkdir()
    data = label_curve.made(settings, 3, data_folder, Progress())

    def curve(name: str, **asked: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir()
        label_curve.curve(settings, 3, data, out, test_pairs=10, folder=folder, progress=Progress(said.append), **asked)
        return rows(out)

    found = curve("first", sizes=[4, 10**6], errors=[0, 1])
    most = found[-1]["labels"]
    assert [(row["error_rate"], row["labels"]) for row in found] == [(0, 4), (0, most), (1, 4), (1, most)]
    assert all(0 <= row["mean_accuracy"] <= 1 and row["n"] == 10 and row["seed"] == 3 for row in found)
    assert found[0]["steps"] < found[1]["steps"] and found[0]["validation_labels"] == 1

    right, wrong = (read_rows(tmp_path / "first" / f"pairs-{error}" / "pairs.jsonl", Pair) for error in (0, 1))
    assert {(pair.condition_id, pair.dimension, pair.loser) for pair in right if pair.split != "test"} == {
        (pair.condition_id, pair.dimension, pair.winner) for pair in wrong if pair.split != "test"
    }
    asked = read_rows(tmp_path / "first" / "labels-0" / "preferences.jsonl", Preference)
    assert most == sum(not row.tie and any(p.condition_id == row.condition_id and p.split == "train" for p in right) for row in asked)

    assert curve("again", sizes=[4], errors=[0, 1]) == found and sum("is there already" in line for line in said) == 2
    assert len(curve("more", sizes=[8], errors=[0])) == 5
