"""How often the classifier of what is to be seen errs itself: on scenes that nobody has met, with and without their object. A minute.

    python -m benchmarks.seen

Written to `benchmarks/results/seen.json`. What it sees in edits is in every evaluation's figures and in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.rows import machine
from infra.disk import replacing
from models.images import to_tensor
from models.mini.scenes import render_scene
from models.mini.seen import FACTS, seen
from pipelines.report import commit

RESULTS = Path(__file__).parent / "results" / "seen.json"
FIRST_SCENE, SCENES = 9_500_000, 600  # ours: scenes that neither the base nor a chain has met


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    told = {"command": "python -m benchmarks.seen", "commit": commit(), "machine": machine(), "classifier": classifier()}
    with replacing(RESULTS) as draft:
        draft.write_text(json.dumps(told, indent=1) + "\n")
    print(*(f"{name}: {value}" for name, value in told["classifier"].items()), sep="\n")


def classifier(count: int = SCENES) -> dict[str, float]:
    """Shares of scenes of which each fact is seen where it is there, and nothing (`gone`) where no object is."""
    found: dict[str, list[bool]] = {}
    for seed in range(FIRST_SCENE, FIRST_SCENE + count):
        scene, everywhere = render_scene(seed), torch.ones(1, 64, 64)
        with_object = seen(to_tensor(scene.image), everywhere, scene.truth, scene.caption, "object")
        with_word = seen(to_tensor(scene.image), everywhere, scene.truth, f'"{scene.words}"', "word")
        without = seen(to_tensor(scene.clean), everywhere, scene.truth, "", "clean")
        for name, value in {**with_object, **with_word, **without}.items():
            found.setdefault(name, []).append(value)
    return {"scenes": count, **{name: sum(found[name]) / len(found[name]) for name in FACTS}}


if __name__ == "__main__":
    main()
