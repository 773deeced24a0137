"""What people judge: one sheet per request with its candidates, and the questions as a file of labels to fill in.

    show_candidates(curated, candidates, out, Taxonomy.load())

`<condition id>.png` holds the request and its candidates in the order in which `questions.jsonl` names them. That order is drawn
per request, so that the place of a picture does not tell how it was made. An edit is shown as the judge sees it, pasted into its
source outside the mask. A line that is filled in is a line of labels as
ops/label.py imports it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from infra.disk import writing
from models.errors import ConfigError
from models.images import paste, to_mask, to_pil, to_tensor
from models.records import Candidate, Condition, read_rows
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.pictures import grid, overlay

CELL = 256  # ours: small pictures are shown at this many pixels, larger ones as they are


def show_candidates(curated: Path, candidates: Path, out: Path, taxonomy: Taxonomy) -> int:
    """Write the sheets and the questions into the folder `out`, which is there whole or not at all; the number of requests.

    Raises ConfigError for a folder that holds something already, cannot be made, or is the current one.
    """
    out = out.resolve()
    if out == Path.cwd():
        raise ConfigError(f"{out} is the current folder, which cannot be replaced.", "Name a folder in it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty.", "Name another folder.")
    answers: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(candidates / "candidates.jsonl", Candidate):
        answers[row.condition_id].append(row.id)
    asked, made = ShardReader(curated), ShardReader(candidates)
    questions = []
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with writing(out):
        draft.mkdir(parents=True)
    try:
        for condition in read_rows(curated / "conditions.jsonl", Condition):
            if condition.id not in answers:
                continue
            shown = [str(name) for name in np.random.default_rng(zlib.crc32(condition.id.encode())).permutation(answers[condition.id])]
            image, region = asked[f"{condition.id}.image"], asked[f"{condition.id}.mask"]
            source, mask = to_tensor(image), to_mask(region)  # [3, H, W], [1, H, W]
            task = taxonomy.task(condition.task)
            sheet = grid(
                [[overlay(image, region), *(to_pil(paste(source, to_tensor(made[name]), mask)) for name in shown)]],
                columns=["asked", *shown],
                captions=[f"{task.title}: {condition.prompt}"],
                cell=max(CELL, *image.size),
            )
            sheet.save(draft / f"{condition.id}.png")
            labels = {dimension: {"best": None, "worst": None} for dimension in task.dimensions}
            questions.append({"condition_id": condition.id, "annotator": "", "shown": shown, "labels": labels})
        (draft / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return len(questions)
