"""Artifacts that every gate passes, as small as can be: what tests change in one respect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from models.records import Condition, Split, write_rows
from models.shards import ShardWriter
from ops.folders import write_metrics
from ops.probe import CHECKPOINTS
from ops.second_opinion import SECOND_OPINIONS
from ops.win_rates import ITEMS, PAIRS

TASKS = [
    {"task": "fill", "n": 9, "n_without_truth": 2, "win_rate": 0.7, "lo": 0.5, "hi": 0.8},
    {"task": "remove", "n": 9, "n_without_truth": 0, "win_rate": 0.6, "lo": 0.35, "hi": 0.8},
    {"task": "extend", "n": 0, "n_without_truth": 0, "win_rate": None, "lo": None, "hi": None},
]
CELLS = [
    {"task": "fill", "dimension": "structure", "n": 9, "win_rate": 0.7, "lo": 0.6, "se": 0.05, "p_worse": 1.0, "judge_win_rate": 0.8},
    {"task": "text", "dimension": "legibility", "n": 9, "win_rate": 0.6, "lo": 0.5, "se": 0.05, "p_worse": 1.0, "judge_win_rate": None},
]
FACTS = [  # .03 is no proof over two
    {"task": "fill", "fact": "colour", "n": 9, "more": -0.3, "p_worse": 0.03},
    {"task": "remove", "fact": "gone", "n": 9, "more": 0.1, "p_worse": 1.0},
]
COUNTS = {"conditions": 12, "dropped_share": 0.1, "first_wins_share": 0.52, "n_train": 8, "n_validation": 2, "n_test": 2}
GOOD: dict[str, dict[str, Any]] = {
    "curated_dataset": {"splits": {}},
    "preference_pairs": {
        "cells": [
            {"task": "fill", "dimension": "structure", **COUNTS},
            {"task": "text", "dimension": "structure", **COUNTS},
            {"task": "extend", "dimension": "structure", **dict.fromkeys(COUNTS, 0), "dropped_share": None, "first_wins_share": None},
        ]
    },
    "reward_model": {"mean_accuracy": 0.7, "order_consistency": 0.8, "loss": 0.6},
    "policy-static": {"finite": True, "preservation_psnr": 30.0, "base_preservation_psnr": 30.2},
    "evaluation": {
        "evidence": "ground_truth",
        "split": "test",
        "chosen_on": "validation",
        "best_mode": "ema",
        "judge": {"split": "test", "mean_accuracy": 0.7, "n": 40},
        "policy": {
            "static": {},
            "ema": {
                **{
                    "mean_win_rate": 0.6,
                    "mean_lo": 0.52,
                    "mean_hi": 0.7,
                    "confirming_mean_lo": 0.46,
                    "preservation_psnr": 30.0,
                    "base_preservation_psnr": 30.2,
                    "outside_similarity": 0.97,
                    "base_outside_similarity": 0.98,
                },
                **{"tasks": TASKS, "cells": CELLS, "facts": FACTS},
            },
        },
    },
    "onnx": {"relative_error": 1e-5},
    "engine": {"bytes": 10, "architectures": [89, 120], "verified": False},
}
GOOD["policy-ema"] = GOOD["policy-static"]
LOOK = {"step": 1, "condition_id": "c", "origin": "o", "task": "fill", "dimension": "structure"}
LOOK |= {"judge": 0.6, "second": None, "measure_win": 1.0, "blind_win": None}
WEIGHTS = {"a.weight": torch.full((4, 4), 2.0), "b.bias": torch.full((4,), -2.0)}


def artifact(folder: Path, name: str, metrics: dict[str, Any]) -> Path:
    """A folder as the stage would have made it, sound apart from what `metrics` says."""
    folder.mkdir()
    write_metrics(folder, metrics)
    if name == "curated_dataset":
        conditions(folder, [("train", "a"), ("validation", "b"), ("test", "c")])
    if name == "evaluation":
        curated = folder.with_name(f"{folder.name}-curated")
        curated.mkdir()
        conditions(curated, [("validation", "b"), ("test", "c")], per_place=1)
        for record in (ITEMS, PAIRS, SECOND_OPINIONS):
            (folder / record).write_text('{"condition_id": "c1", "split": "test"}\n')
    if name == "onnx":
        shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]), helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [shape[0]], [shape[1]])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(folder / "transformer.onnx"))
    if name == "engine":
        (folder / "transformer.engine").write_bytes(b"engine")
    if name.startswith("policy-"):
        (folder / "transformer").mkdir()
        save_file({name: weight + 0.01 for name, weight in WEIGHTS.items()}, folder / "transformer" / "one.safetensors")
        (folder / CHECKPOINTS).write_text(json.dumps(LOOK) + "\n")
    return folder


def conditions(folder: Path, places: list[tuple[Split, str]], per_place: int = 4, pixels: int = 0) -> None:
    """Conditions in (split, source) places; with `pixels`, every image is the same one."""
    rows: list[Condition] = []
    with ShardWriter(folder) as shards:
        for split, source in places:
            for _ in range(per_place):
                key = f"c{len(rows)}"
                shards.add(f"{key}.image", Image.fromarray(np.full((2, 2, 3), pixels or 1 + len(rows), np.uint8)))
                rows.append(Condition(id=key, source_id=source, task="fill", prompt="p", split=split, kind="scene"))
    write_rows(folder / "conditions.jsonl", rows)
