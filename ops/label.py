"""Best and worst of each condition's candidates, per dimension: by a scripted annotator, or imported from people.

    labels = LabelStore("sqlite:///labels.db")
    label_scripted(LabelConfig(), curated, candidates, imported(labels, digest), taxonomy, out, Progress(print))
    record_scripted(out, labels, digest)
    import_labels(Path("from-people.jsonl"), curated, candidates, labels, digest, taxonomy)
    export_labels(Path("all.jsonl"), labels, digest)

The scripted annotator knows the perfect edit of a condition and ranks by the measure that the taxonomy names for the
dimension. Like a person it errs (`error_rate`; never on the test split, by which judges are measured) and gives up where
candidates hardly differ (`tie_margin`; the paper discards such dimensions). A line of people's labels, as `import_labels`
reads and `export_labels` writes it:

    {"condition_id": "..", "annotator": "..", "shown": [candidate ids in order], "labels": {"structure": {"best": "..", "worst": ".."},
     "aesthetics": {"tie": true}}}
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from matplotlib.figure import Figure
from PIL import Image

from infra.disk import replacing
from infra.labels import LabelStore
from infra.progress import Progress
from models.config import OpConfig
from models.errors import BadLabel, BadManifest, NotEnoughData
from models.images import paste, to_mask, to_tensor
from models.masks import binary
from models.mini.measures import measure
from models.records import Candidate, Condition, Preference, read_rows, write_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.pictures import LINE, SERIES, grid, overlay, stacked_bars


class LabelConfig(OpConfig):
    """How the scripted annotator behaves."""

    scripted: bool = pydantic.Field(True, description="Let the scripted annotator label; off, only imported labels are taken (ours).")
    annotator: str = pydantic.Field("scripted", min_length=1, description="Its name in the label database (ours).")
    error_rate: float = pydantic.Field(
        0.05, ge=0, le=1, description="How often it swaps best and worst; never on the test split, which is the yardstick (ours)."
    )
    tie_margin: float = pydantic.Field(
        0.5,
        ge=0,
        description="Best minus worst under which it calls a tie, in standard deviations among one condition's candidates (ours).",
    )
    seed: int = pydantic.Field(0, ge=0, description="Seed of the order shown and of its errors (ours).")


def label_scripted(
    config: LabelConfig,
    curated: Path,
    candidates: Path,
    people: Sequence[Preference],
    taxonomy: Taxonomy,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Label every condition with a known perfect edit, and write these labels and people's for the same candidates into `out`.

    Writes `preferences.jsonl`, pictures and `metrics.json`; returns the metrics. The label database is not touched: see
    `record_scripted`. Raises NotEnoughData when there is no label at all.
    """
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    shown = by_condition(candidates)
    preferences = list(people)
    if config.scripted:
        scores = score_candidates(conditions, shown, curated, candidates, taxonomy, progress)
        spread = spread_of(conditions, scores)
        rows = [_judge(config, conditions[condition], dimension, values, spread) for (condition, dimension), values in scores.items()]
        answered = {_question(row) for row in people}  # the script never answers for a person of its name
        preferences += [row for row in rows if _question(row) not in answered]
        preferences.sort(key=_question)
    if not preferences:
        raise NotEnoughData(
            "There is no label for these candidates.", "Import labels of people, or use conditions whose perfect edit is known."
        )
    write_rows(out / "preferences.jsonl", preferences)
    cells = _cells(conditions, preferences, taxonomy)
    metrics = {
        "labels": len(preferences),
        "annotators": dict(Counter(row.annotator for row in preferences)),
        "sources": dict(Counter(row.source for row in preferences)),
        "unlabelled_conditions": len(shown.keys() - {row.condition_id for row in preferences}),
        "cells": cells,
    }
    save_picture(out, "labels", _bars(cells))
    _draw_examples(out, conditions, preferences, curated, candidates, taxonomy)
    write_metrics(out, metrics)
    return metrics


def imported(labels: LabelStore, candidates_digest: str) -> list[Preference]:
    """People's labels for these candidates."""
    return [row for row in labels.rows(candidates_digest) if row.source == "import"]


def record_scripted(preferences: Path, labels: LabelStore, candidates_digest: str) -> int:
    """Put a preferences artifact's scripted labels into the database, all or none; the number of new or changed ones."""
    rows = read_rows(preferences / "preferences.jsonl", Preference)
    return labels.add([row for row in rows if row.source == "scripted"], candidates_digest, replace=True)


def _question(row: Preference) -> tuple[str, str, str]:
    return row.condition_id, row.dimension, row.annotator


def by_condition(candidates: Path) -> dict[str, list[str]]:
    """Condition id -> its candidates' ids, in order of index."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in sorted(read_rows(candidates / "candidates.jsonl", Candidate), key=lambda row: (row.condition_id, row.index)):
        found[row.condition_id].append(row.id)
    return found


Scores = dict[tuple[str, str], dict[str, float]]  # (condition, dimension) -> candidate -> measure
Spread = dict[tuple[str, str], float]  # (task, dimension) -> standard deviation of the measure among one condition's candidates


def score_candidates(
    conditions: dict[str, Condition], shown: dict[str, list[str]], curated: Path, candidates: Path, taxonomy: Taxonomy, progress: Progress
) -> Scores:
    """The edits in `shown` (condition id -> candidates' ids) by the measure that the taxonomy names for each dimension of their task.

    Conditions whose perfect edit is not known, or with a single candidate, are left out. Raises BadLabel for a condition that `conditions`
    does not have.
    """
    asked, answered = ShardReader(curated), ShardReader(candidates)
    scores: Scores = {}
    with progress.bar("scripted labels", len(shown), "condition") as bar:
        for condition_id, ids in shown.items():
            if condition_id not in conditions:
                raise BadLabel(
                    f"The candidates answer {condition_id}, which the curated dataset does not hold.", "Generate the candidates again."
                )
            condition = conditions[condition_id]
            if f"{condition_id}.target" in asked and len(ids) > 1:
                source, target = to_tensor(asked[f"{condition_id}.image"]), to_tensor(asked[f"{condition_id}.target"])  # [3, H, W]
                mask = to_mask(asked[f"{condition_id}.mask"])  # [1, H, W]
                edits = {name: paste(source, to_tensor(answered[name]), mask) for name in ids}
                for dimension in taxonomy.task(condition.task).dimensions:
                    known = taxonomy.dimension(dimension).labelled_by
                    score = partial(measure, known, target=target, mask=mask, truth=condition.truth, prompt=condition.prompt)
                    scores[condition_id, dimension] = {name: score(image=edits[name]) for name in ids}
            bar.advance()
    return scores


def spread_of(conditions: dict[str, Condition], scores: Scores) -> Spread:
    """Pooled over the conditions of each cell.

    Over training conditions where the cell has any: what is sealed must not decide which training labels are ties.
    """
    variances: dict[tuple[str, str], dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for (condition_id, dimension), values in scores.items():
        condition = conditions[condition_id]
        variances[condition.task, dimension][condition.split == "train"].append(float(np.var(list(values.values()), ddof=1)))
    return {cell: float(np.sqrt(np.mean(found[True] or found[False]))) for cell, found in variances.items()}


def _judge(config: LabelConfig, condition: Condition, dimension: str, scores: dict[str, float], spread: Spread) -> Preference:
    """One answer. It is drawn from the condition's id, so it does not depend on which other conditions there are."""
    own = [config.seed, zlib.crc32(config.annotator.encode()), zlib.crc32(condition.id.encode())]
    shown = [
        str(name) for name in np.random.default_rng(own).permutation(list(scores))
    ]  # one order for all dimensions, as a person sees them
    best, worst = max(shown, key=scores.__getitem__), min(shown, key=scores.__getitem__)
    tie = scores[best] - scores[worst] <= config.tie_margin * spread[condition.task, dimension]
    errs = np.random.default_rng([*own, zlib.crc32(dimension.encode())]).random() < config.error_rate
    if errs and condition.split != "test":
        best, worst = worst, best
    return Preference(
        condition_id=condition.id,
        dimension=dimension,
        annotator=config.annotator,
        source="scripted",
        shown=shown,
        best=None if tie else best,
        worst=None if tie else worst,
        tie=tie,
    )


def _cells(conditions: dict[str, Condition], preferences: list[Preference], taxonomy: Taxonomy) -> list[dict[str, Any]]:
    asked: dict[tuple[str, str], list[Preference]] = defaultdict(list)
    for row in preferences:
        asked[conditions[row.condition_id].task, row.dimension].append(row)
    found = []
    for task, dimension in taxonomy.cells:
        rows = asked[task, dimension]
        decided = Counter(row.source for row in rows if not row.tie)
        ties = sum(row.tie for row in rows)
        found.append(
            {
                "task": task,
                "dimension": dimension,
                "labels": len(rows),
                "decided_by_script": decided["scripted"],
                "decided_by_people": decided["import"],
                "ties": ties,
                "ties_share": ties / max(1, len(rows)),
            }
        )
    return found


def _bars(cells: list[dict[str, Any]]) -> Figure:
    """Labels per cell by where they come from, with the ties at the end of each bar."""
    parts = {
        name.replace("_", " "): ([cell[name] for cell in cells], colour)
        for name, colour in (("decided_by_script", SERIES[0]), ("decided_by_people", SERIES[1]), ("ties", LINE))
    }
    return stacked_bars([f"{cell['task']} · {cell['dimension']}" for cell in cells], parts, x="labels")


def _draw_examples(
    out: Path,
    conditions: dict[str, Condition],
    preferences: list[Preference],
    curated: Path,
    candidates: Path,
    taxonomy: Taxonomy,
) -> None:
    """For each dimension of a task its first answer that is no tie, each about another condition while there are some."""
    asked, answered = ShardReader(curated), ShardReader(candidates)
    for task in taxonomy.active:
        decided = [row for row in preferences if conditions[row.condition_id].task == task.name and not row.tie]
        cells, captions, used = [], [], set()
        for dimension in task.dimensions:
            rows = [row for row in decided if row.dimension == dimension]
            row = min(rows, key=lambda row: row.condition_id in used, default=None)
            if row is None:
                continue
            used.add(row.condition_id)
            source, mask = asked[f"{row.condition_id}.image"], asked[f"{row.condition_id}.mask"]
            best, worst = (Image.composite(answered[str(name)], source, binary(mask)) for name in (row.best, row.worst))
            key = f"{row.condition_id}.target"
            target = asked[key] if key in asked else None  # noqa: SIM401 (a ShardReader is no dict)
            cells.append([overlay(source, mask), best, worst, target])
            captions.append(f"{taxonomy.dimension(dimension).title}: {conditions[row.condition_id].prompt} ({row.annotator})")
        if cells:
            columns = ["asked", "best", "worst", "ideal"]
            save_picture(out, f"examples-{task.name}", grid(cells, columns=columns, captions=captions, cell=112))


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    best: str | None = None
    worst: str | None = None
    tie: bool = False


class _Line(pydantic.BaseModel):
    """One person's answers to one condition."""

    model_config = pydantic.ConfigDict(extra="forbid")

    condition_id: str
    annotator: str = pydantic.Field(min_length=1)
    shown: list[str] = pydantic.Field(min_length=2)
    labels: dict[str, _Answer] = pydantic.Field(min_length=1)


def import_labels(
    path: Path, curated: Path, candidates: Path, labels: LabelStore, candidates_digest: str, taxonomy: Taxonomy, *, replace: bool = False
) -> int:
    """Add a file of people's labels to the database, all of it or nothing; return how many answers are new.

    Raises BadManifest for a missing file or a line that is no such JSON object; BadLabel, naming the line, for an unknown
    condition, candidate or dimension, a candidate shown twice, an answer that contradicts itself, or one given differently
    before (see `replace`).
    """
    conditions = {row.id: row for row in read_rows(curated / "conditions.jsonl", Condition)}
    known = by_condition(candidates)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadManifest(f"{path} is not a readable UTF-8 file.", "Give a JSONL file of labels.") from error
    rows: list[Preference] = []
    for number, text in enumerate(lines, start=1):
        if text.strip():
            rows += _imported(f"{path.name}, line {number}", text, conditions, known, taxonomy)
    return labels.add(rows, candidates_digest, replace=replace)


def _imported(where: str, text: str, conditions: dict[str, Condition], known: dict[str, list[str]], taxonomy: Taxonomy) -> list[Preference]:
    try:
        line = _Line.model_validate(json.loads(text))
    except (json.JSONDecodeError, pydantic.ValidationError) as error:
        raise BadManifest(f"{where} is not a line of labels: {error}.", "Correct or remove that line.") from error
    if line.condition_id not in conditions or line.condition_id not in known:
        raise BadLabel(
            f"{where} labels the unknown condition {line.condition_id!r}.", "Label the conditions of this version of the candidates."
        )
    named = [*line.shown, *(name for answer in line.labels.values() for name in (answer.best, answer.worst) if name is not None)]
    if unknown := [name for name in named if name not in known[line.condition_id]]:
        raise BadLabel(f"{where} names the unknown candidate {unknown[0]!r}.", f"Use {', '.join(known[line.condition_id])}.")
    if twice := [name for name, count in Counter(line.shown).items() if count > 1]:
        raise BadLabel(f"{where} shows {twice[0]!r} twice.", "Name every candidate once, in the order shown.")
    task = taxonomy.task(conditions[line.condition_id].task)
    rows = []
    for dimension, answer in line.labels.items():
        if dimension not in task.dimensions:
            raise BadLabel(f"{where} judges {task.name!r} on {dimension!r}.", f"Use {', '.join(task.dimensions)}.")
        try:
            rows.append(
                Preference(
                    condition_id=line.condition_id,
                    dimension=dimension,
                    annotator=line.annotator,
                    source="import",
                    shown=line.shown,
                    **answer.model_dump(),
                )
            )
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise BadLabel(f"{where}, {dimension}: {reason}.", "Correct or remove that answer.") from error
    return rows


def export_labels(path: Path, labels: LabelStore, candidates_digest: str) -> int:
    """Write every label for these candidates in the form `import_labels` reads; return the number of lines.

    The file is there whole or as it was. Raises ConfigError for a place that cannot be written to, DiskFull.
    """
    lines: dict[tuple[str, str, tuple[str, ...]], dict[str, Any]] = defaultdict(dict)
    for row in labels.rows(candidates_digest):
        answer = {"tie": True} if row.tie else {"best": row.best, "worst": row.worst}
        lines[row.condition_id, row.annotator, tuple(row.shown)][row.dimension] = answer
    with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        for (condition_id, annotator, shown), answers in sorted(lines.items()):
            file.write(json.dumps({"condition_id": condition_id, "annotator": annotator, "shown": shown, "labels": answers}) + "\n")
    return len(lines)
