"""The human side of a report: everything the template `report.html.j2` shows, from the facts and the artifacts' folders."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from models.blind import RELIABLE
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.lineage import POLICY_PREFIX
from ops.pictures import curves, overlay, svg
from ops.policy_watch import hindsight, unrewarded
from ops.probe import CHECKPOINTS, gold_against_proxy, read_checkpoints
from ops.win_rates import BASE, COUNTED, ITEMS, Item, duels, read_items, win_rate_plot

EXAMPLES = 3  # ours: rows of pictures per task
THUMB_PX = 256  # ours: longer side of a picture on the page
TOLD = {"object": "object there", "colour": "in its colour", "shape": "in its shape", "word": "the asked word", "gone": "object gone"}
ROW_PX, FIRST_PX = 46, 23  # height of a row of the lineage, and where its first dot is: the template's CSS says the same


def render_page(facts: dict[str, Any], metrics: Mapping[str, dict[str, Any]], folders: Mapping[str, Path], taxonomy: Taxonomy) -> str:
    """One self-contained HTML page.

    Args:
        facts: what report.json holds. metrics, folders: by artifact name, of everything the chain reached.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, size=size, duration=duration)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        counted=COUNTED.get(facts["evidence"], ""),
        summary=facts["policy"][facts["best_mode"]] if facts["best_mode"] else None,
        stopped_by=_stopped_by(facts),
        all_passed=all(gate["passed"] for gate in facts["gates"]),
        tasks={task.name: task.title for task in taxonomy.active},
        dimensions={dimension.name: dimension.title for dimension in taxonomy.dimensions},
        cells=_cells(facts, taxonomy),
        lost=_lost(facts),
        seen=_seen(facts, taxonomy),
        charts=_charts(facts, folders, taxonomy),
        training=_training(facts, folders, taxonomy),
        looked_at=[each.title for each in taxonomy.dimensions if each.measured_by in RELIABLE],
        examples=_examples(facts, metrics, folders, taxonomy),
        lineage=_lineage(facts),
        row_px=ROW_PX,
        slowest=max(facts["stages"].values(), default=0),
        unproven=_unproven(facts, taxonomy),
    )


def _stopped_by(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The gate that the refusal names. Another may have failed without ending the chain: one mode of two, say."""
    failed = [gate for gate in facts["gates"] if not gate["passed"]]
    return next((gate for gate in failed if gate["name"] in (facts["refused"] or "")), None)


def _cells(facts: dict[str, Any], taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """One row per task and dimension with whatever is known of it: wins by mode, measures by policy, the judge, pairs, photographs."""

    def by_cell(cells: Sequence[dict[str, Any]] | None) -> dict[tuple[str, str], dict[str, Any]]:
        return {(cell["task"], cell["dimension"]): cell for cell in cells or ()}

    wins = {mode: by_cell(summary["cells"]) for mode, summary in (facts["policy"] or {}).items()}
    photos = {mode: by_cell(summary["cells"]) for mode, summary in (facts["photos"] or {}).items() if summary}
    absolute = {name: by_cell(cells) for name, cells in (facts["absolute"] or {}).items()}
    judge, pairs = by_cell((facts["judge"] or {}).get("cells")), by_cell(facts["pairs"])
    return [
        {
            "task": cell[0],
            "dimension": cell[1],
            "wins": {mode: found.get(cell) for mode, found in wins.items()},
            "photos": {mode: found.get(cell) for mode, found in photos.items()},
            "absolute": {name: found.get(cell) for name, found in absolute.items()},
            "judge": judge.get(cell),
            "pairs": pairs.get(cell),
        }
        for cell in taxonomy.cells
    ]


def _lost(facts: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Mode -> the cells whose whole interval lies under one half; modes without any are left out."""
    found = {mode: [cell for cell in summary["cells"] if cell["hi"] < 0.5] for mode, summary in (facts["policy"] or {}).items()}
    return {mode: cells for mode, cells in found.items() if cells}


def _seen(facts: dict[str, Any], taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """One row per task and fact: what it is called, how many edits were asked for it, and by policy the share that show it."""
    by_name = {name: {(row["task"], row["fact"]): row for row in rows} for name, rows in (facts["seen"] or {}).items()}
    cells = [(task.name, fact) for task in taxonomy.active for fact in TOLD if any((task.name, fact) in rows for rows in by_name.values())]
    return [{"task": cell[0], "told": TOLD[cell[1]], "by": {name: rows.get(cell) for name, rows in by_name.items()}} for cell in cells]


def _charts(facts: dict[str, Any], folders: Mapping[str, Path], taxonomy: Taxonomy) -> dict[str, str]:
    """Inline SVG by name; empty where there is nothing to draw."""
    charts = {"wins": "", "reward": "", "judge": ""}
    if facts["policy"] and any(summary["n"] for summary in facts["policy"].values()):
        charts["wins"] = svg(win_rate_plot(facts["policy"], taxonomy))
    rewards = {}
    for name, folder in sorted(folders.items()):  # by name, as in the plot of win rates: a mode keeps its colour
        if name.startswith(POLICY_PREFIX) and (rows := _lines(folder / "curve.jsonl")):
            rewards[name.removeprefix(POLICY_PREFIX)] = ([row["step"] for row in rows], [row["reward"] for row in rows])
    if rewards:
        longest = max(len(steps) for steps, _ in rewards.values())
        smooth = max(1, longest // 12)
        charts["reward"] = svg(curves(rewards, x="step", y="mean P(evaluated is better)", reference=0.5, smooth=smooth))
    rows = _lines(folders["reward_model"] / "curve.jsonl") if "reward_model" in folders else []
    if rows:
        accuracy = ([row["step"] for row in rows], [row["accuracy"] for row in rows])
        charts["judge"] = svg(curves({"accuracy": accuracy}, x="step", y="accuracy on validation pairs", reference=0.5))
    return charts


def _training(facts: dict[str, Any], folders: Mapping[str, Path], taxonomy: Taxonomy) -> dict[str, dict[str, Any]]:
    """Mode -> what became of it in training: the judges' opinions of its checkpoints and the truth as inline SVG, which one was
    delivered, and the cells that gave no reward."""
    shown = {}
    for mode, trained in (facts["training"] or {}).items():
        path = folders[f"{POLICY_PREFIX}{mode}"] / CHECKPOINTS
        rows = read_checkpoints(path) if path.exists() else []
        picture = svg(gold_against_proxy(rows, taxonomy)) if rows else ""
        off = None if trained["rewarded"] is None else unrewarded(trained["rewarded"], taxonomy)
        steps = {"over": trained["over_optimised"], "delivered": trained["best_step"]}
        shown[mode] = {"picture": picture, "hindsight": hindsight(trained), "unrewarded": off, **steps}
    return shown


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _examples(
    facts: dict[str, Any], metrics: Mapping[str, dict[str, Any]], folders: Mapping[str, Path], taxonomy: Taxonomy
) -> dict[str, list[dict[str, Any]]]:
    """Per task, the first conditions of the tested split: what was asked, what everyone made of it, and what a perfect edit looks like."""
    if not {"evaluation", "curated_dataset"} <= set(folders):
        return {}
    items = [item for item in read_items(folders["evaluation"] / ITEMS) if item["split"] == metrics["evaluation"]["split"]]
    edits, sources = ShardReader(folders["evaluation"]), ShardReader(folders["curated_dataset"])
    won = _won(items, list(facts["policy"]), metrics["evaluation"]["settings"]["tie_tolerance"])
    found: dict[str, list[dict[str, Any]]] = {}
    for task in taxonomy.active:
        mine = [item for item in items if item["task"] == task.name]
        for key in list(dict.fromkeys((item["condition_id"], item["seed"]) for item in mine))[:EXAMPLES]:
            condition, seed = key
            same = [item for item in mine if (item["condition_id"], item["seed"]) == key]
            image = sources[f"{condition}.image"]
            pictures = [{"label": "asked", "uri": _uri(overlay(image, sources[f"{condition}.mask"])), "note": ""}]
            for item in same:
                uri = _uri(edits[f"{condition}.{seed}.{item['policy']}"])
                pictures.append({"label": item["policy"], "uri": uri, "note": won.get((*key, item["policy"]), "")})
            if f"{condition}.target" in sources:
                pictures.append({"label": "ideal", "uri": _uri(sources[f"{condition}.target"]), "note": ""})
            shown = {"prompt": same[0]["prompt"], "kind": same[0]["kind"], "pictures": pictures, "pixelated": max(image.size) < 128}
            found.setdefault(task.name, []).append(shown)
    return found


def _won(items: Sequence[Item], modes: Sequence[str], tie_tolerance: float) -> dict[tuple[str, int, str], str]:
    """Under each tuned edit that was measured: on how many of its dimensions it beats the base's."""
    notes: dict[tuple[str, int, str], str] = {}
    for mode in modes:
        by_key: dict[tuple[str, int], list[float]] = {}
        for duel in duels(items, mode, BASE, tie_tolerance):
            if duel.truth is not None:
                by_key.setdefault(duel.key, []).append(duel.truth)
        notes |= {(*key, mode): f"better {sum(v == 1 for v in values)} of {len(values)}" for key, values in by_key.items()}
    return notes


def _uri(image: Image.Image) -> str:
    """A data URI: PNG as it is when small, else a JPEG thumbnail."""
    buffer = io.BytesIO()
    if max(image.size) <= THUMB_PX // 2:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.convert("RGB")
        image.thumbnail((THUMB_PX, THUMB_PX))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _lineage(facts: dict[str, Any]) -> dict[str, Any]:
    """Artifacts, parents before children, and the arcs between them as SVG paths."""
    artifacts = facts["artifacts"]
    at = {artifacts[name]["digest"]: name for name in artifacts}
    parents = {name: [at[parent["digest"]] for parent in entry["parents"] if parent["digest"] in at] for name, entry in artifacts.items()}
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for parent in parents[name]:
                visit(parent)
            order.append(name)

    for name in artifacts:
        visit(name)
    rows = [
        {"name": name, **artifacts[name], "from": parents[name], "reused": name in facts["reused"], "seconds": facts["stages"].get(name)}
        for name in order
    ]
    arcs = []
    for child, name in enumerate(order):
        for parent in (order.index(above) for above in parents[name]):
            top, bottom, reach = FIRST_PX + parent * ROW_PX, FIRST_PX + child * ROW_PX, 84 - min(78, 8 + 9 * (child - parent))
            arcs.append(f"M84 {top} C{reach} {top} {reach} {bottom} 84 {bottom}")
    return {"rows": rows, "arcs": arcs}


def _unproven(facts: dict[str, Any], taxonomy: Taxonomy) -> list[str]:
    """What a reader might take for proven and is not."""
    notes = []
    engine, judge = facts["engine"], facts["judge"]
    if engine and not engine["verified"]:
        notes.append("The engine was built but never executed: no GPU of its kind was there to run it. The release calls it unverified.")
    if facts["photos"] and any(facts["photos"].values()):
        notes.append("Photographs have no known perfect edit: at most the judge's opinion and the distance to withheld pixels are known.")
    if facts["evidence"] == "blind":
        notes.append(
            "No perfect edit was known: wins are counted by measures that need no target and that may be wrong on a single picture."
        )
    if facts["policy"] and len(facts["policy"]) > 1 and facts["chosen_on"] == facts["split"]:
        notes.append("The better mode was chosen on the very split it is reported on, which flatters it.")
    if judge and judge["split"] != "test":
        notes.append("The judge's accuracy is from validation pairs, which chose its weights; the sealed test pairs were not asked.")
    rows = [row for summary in (facts["policy"] or {}).values() for row in summary["tasks"] if not row["n"]]
    for note, names in {
        "No condition was tested, so nothing is known, of": {row["task"] for row in rows if not row["n_without_truth"]},
        "No ground truth was tested for": {row["task"] for row in rows if row["n_without_truth"]},
    }.items():
        if names:
            titles = ", ".join(task.title for task in taxonomy.active if task.name in names)
            notes.append(f"{note}: {titles}. The mean leaves these tasks out.")
    if facts["policy"]:
        notes.append("All figures come from one set of held-out conditions and one training run per mode. No human has rated these edits.")
    return notes


def number(value: float | None) -> str:
    """Three significant digits; a dash where nothing is known."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e5:
        return f"{int(value):,}"
    if 0.001 <= abs(value) < 1e5:
        return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1}f}"
    return f"{value:.1e}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f}%"


def size(count: int) -> str:
    """Bytes, readable."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds, readable."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
