"""What is to be seen in the edits that finished homes hold: objects, colours, shapes, words, and what was to go. A minute a home.

    python -m benchmarks.seen --homes .bench/bench-0 .bench/bench-1 .bench/bench-2

The sealed edits of a home's first evaluation are classified as today's evaluations classify theirs (models/mini/seen.py), and so are
scenes that nobody has met, with and without their object: how often the classifier itself errs. Written to
`benchmarks/results/seen.json`; the table that is printed is the one in docs/measures.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
from ops.win_rates import ITEMS, SCENE, Item, read_items, seen_shares
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
    taxonomy, rows = Taxonomy.load(), []
    for home in arguments.homes:
        items = classified(Workspace(home.resolve()).store, taxonomy)
        names = list(dict.fromkeys(item["policy"] for item in items))
        rows.append({"home": home.name, "seen": {name: seen_shares(items, name, taxonomy) for name in names}})
    told = {"command": "python -m benchmarks.seen", "commit": commit(), "machine": machine(), "classifier": classifier(), "rows": rows}
    with replacing(RESULTS) as draft:
        draft.write_text(json.dumps(told, indent=1) + "\n")
    print(table(rows, taxonomy), *(f"{name}: {value}" for name, value in told["classifier"].items()), sep="\n")


def classified(store: ArtifactStore, taxonomy: Taxonomy) -> list[Item]:
    """The sealed scenes' records of the first evaluation, with what is to be seen in each edit."""
    version = store.versions("evaluation")[0]
    folder = store.get(version.ref)
    curated = next(store.get(ref) for ref in version.parents if ref.name == "curated_dataset")
    edits, shards = ShardReader(folder), ShardReader(curated)
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    items = [item for item in read_items(folder / ITEMS) if item["kind"] == SCENE and item["split"] == "test"]
    for item in items:
        asked = conditions[item["condition_id"]]
        edit, mask = to_tensor(edits[f"{asked.id}.{item['seed']}.{item['policy']}"]), to_mask(shards[f"{asked.id}.mask"])
        item["seen"] = seen(edit, mask, asked.truth, asked.prompt, taxonomy.task(asked.task).condition)
    return items


def classifier(count: int = SCENES) -> dict[str, float]:
    """Shares of scenes of which each fact is seen where it is there, and of which an object is seen where there is none."""
    found: dict[str, list[bool]] = {}
    for seed in range(FIRST_SCENE, FIRST_SCENE + count):
        scene, everywhere = render_scene(seed), torch.ones(1, 64, 64)
        with_object = seen(to_tensor(scene.image), everywhere, scene.truth, scene.caption, "object")
        with_word = seen(to_tensor(scene.image), everywhere, scene.truth, f'"{scene.words}"', "word")
        without = seen(to_tensor(scene.clean), everywhere, scene.truth, "", "clean")
        for name, value in {**with_object, **with_word, **without}.items():
            found.setdefault(name, []).append(value)
    return {"scenes": count, **{name: sum(found[name]) / len(found[name]) for name in FACTS}}


def table(rows: Sequence[dict[str, Any]], taxonomy: Taxonomy) -> str:
    """Per task and fact the edits asked in all homes, and the share of each contestant: the mean of the homes, and each of them."""
    names = list(rows[0]["seen"])
    lines = ["| " + " | ".join(["task", "to be seen", "edits", *names]) + " |", "| --- " * (3 + len(names)) + "|"]
    for task in taxonomy.active:
        for fact in FACTS:
            told = {
                name: [each for row in rows for each in row["seen"][name] if (each["task"], each["fact"]) == (task.name, fact)]
                for name in names
            }
            if not told[names[0]]:
                continue
            shares = {name: [each["share"] for each in mine] for name, mine in told.items()}
            cells = [f"{sum(mine) / len(mine):.2f} ({', '.join(f'{share:.2f}' for share in mine)})" for mine in shares.values()]
            lines.append("| " + " | ".join([task.name, fact, str(sum(each["n"] for each in told[names[0]])), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
