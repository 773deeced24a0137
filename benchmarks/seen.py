"""What is to be seen in the edits that finished homes hold: objects, colours, shapes, words, and what was to go. A minute a home.

    python -m benchmarks.seen --homes .bench/bench-0 .bench/bench-1 .bench/bench-2

The sealed edits of a home's first evaluation are classified as today's evaluations classify theirs (models/mini/seen.py), and so are
scenes that nobody has met, with and without their object: how often the classifier itself errs. Written to
`benchmarks/results/seen.json`; the table that is printed is the one in docs/measures.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import machine
from infra.disk import replacing
from infra.stores.base import ArtifactStore
from infra.workspace import Workspace
from models.images import to_mask, to_tensor
from models.mini.scenes import render_scene
from models.mini.seen import FACTS, seen
from models.records import Condition, read_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.train_policy import MODES
from ops.win_rates import BASE, ITEMS, SCENE, Item, fact_rows, read_items, seen_shares
from pipelines.report import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "seen.json"
FIRST_SCENE, SCENES = 9_500_000, 600  # ours: scenes that neither the base nor a chain has met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--homes", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    if gone := [str(home) for home in arguments.homes if not home.is_dir()]:
        parser.error(f"there is no home {', '.join(gone)}")
    torch.set_num_threads(1)
    taxonomy, homes = Taxonomy.load(), {home.name: Workspace(home.resolve()).store for home in arguments.homes}
    items = {name: classified(name, store, taxonomy) for name, store in homes.items()}
    everything = [item for mine in items.values() for item in mine]
    told = {
        "command": "python -m benchmarks.seen",
        "commit": commit(),
        "machine": machine(),
        "classifier": classifier(),
        "rows": [
            {
                "home": name,
                "seen": {policy: seen_shares(mine, policy, taxonomy) for policy in (BASE, *MODES)},
                "facts": {mode: fact_rows(mine, mode, BASE, taxonomy) for mode in MODES},
            }
            for name, mine in items.items()
        ],
        "differences": {mode: fact_rows(everything, mode, BASE, taxonomy) for mode in MODES},
    }
    with replacing(RESULTS) as draft:
        draft.write_text(json.dumps(told, indent=1) + "\n")
    print(table(told), *(f"{name}: {value}" for name, value in told["classifier"].items()), sep="\n")


def classified(home: str, store: ArtifactStore, taxonomy: Taxonomy) -> list[Item]:
    """The sealed scenes' records of the first evaluation, with what is to be seen in each edit; names carry the home's."""
    version = store.versions("evaluation")[0]
    folder = store.get(version.ref)
    curated = next(store.get(ref) for ref in version.parents if ref.name == "curated_dataset")
    edits, shards = ShardReader(folder), ShardReader(curated)
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    items = [item for item in read_items(folder / ITEMS) if item["kind"] == SCENE and item["split"] == "test"]
    for item in items:
        asked = conditions[item["condition_id"]]
        edit, mask = to_tensor(edits[f"{asked.id}.{item['seed']}.{item['policy']}"]), to_mask(shards[f"{asked.id}.mask"])
        item["condition_id"], item["origin"] = f"{home}/{asked.id}", f"{home}/{item['origin']}"
        item["seen"] = seen(edit, mask, asked.truth, asked.prompt, taxonomy.task(asked.task).condition)
    return items


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


def table(told: dict[str, Any]) -> str:
    """Per task and fact the edits asked in all homes, each contestant's share (mean of homes, and each of them), and the differences."""
    columns = ["task", "to be seen", "edits", BASE, *MODES, *(f"{mode} less base" for mode in MODES)]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for place, first in enumerate(told["differences"][MODES[0]]):
        cell = first["task"], first["fact"]
        cells = [*cell, str(first["n"])]
        for name in (BASE, *MODES):
            shares = [each["share"] for row in told["rows"] for each in row["seen"][name] if (each["task"], each["fact"]) == cell]
            cells.append(f"{sum(shares) / len(shares):.2f} ({', '.join(f'{share:.2f}' for share in shares)})")
        for mode in MODES:
            more = told["differences"][mode][place]
            cells.append(f"{more['more']:+.2f} ({more['lo']:+.2f} to {more['hi']:+.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
