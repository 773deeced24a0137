"""A judge in Qwen2.5-VL's on-disk layout at toy size, built in code (no network, under three seconds).

    folder = save_tiny_judge(tmp_path / "judge")
    judge = Judge.load(folder, Taxonomy.load())

Random weights: its opinions are noise. The classes, files and code paths are the full-size judge's.
"""

from __future__ import annotations

from pathlib import Path

from models.judge import Judge
from models.mini.judge_build import build_judge
from models.taxonomy import Taxonomy

PROMPT = "a small red circle on a striped wall"


def tiny_queries(taxonomy: Taxonomy) -> list[str]:
    """One query for every cell of the taxonomy."""
    return [taxonomy.query(task, dimension, PROMPT) for task, dimension in taxonomy.cells]


def tiny_judge(taxonomy: Taxonomy | None = None, seed: int = 0) -> Judge:
    taxonomy = taxonomy or Taxonomy.load()
    model, processor = build_judge(tiny_queries(taxonomy), hidden=32, layers=2, vision_hidden=32, vision_depth=1, seed=seed)
    return Judge(model, processor, taxonomy)


def save_tiny_judge(folder: Path, seed: int = 0) -> Path:
    """Write it and return the folder."""
    tiny_judge(seed=seed).save(folder)
    return folder
