"""The rows that stages hand to each other, one JSON object per line.

    write_rows(folder / "conditions.jsonl", conditions)
    conditions = read_rows(folder / "conditions.jsonl", Condition)

Images are not in the rows: they lie in shards (models/shards.py) under keys derived from the row's id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar, get_args

import pydantic

from models.errors import BadManifest
from models.taxonomy import MaskKind

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Source(_Row):
    """One source image of the pool, after the checks and before curation.

    Shard keys: `<id>.image` (RGB); where known `<id>.object` (L, 255 on the object: the user's mask or a scene's object),
    `<id>.words` (L, 255 on a scene's lettering) and `<id>.clean` (RGB, the picture without its object).
    """

    id: str
    kind: Literal["scene", "photo", "user"]
    caption: str = ""  # what the whole picture or its object shows
    words: str = ""  # the lettering in it
    task: str | None = None  # the user's manifest may fix the task
    licence: str = ""
    truth: dict = {}
    tags: list[str] = []


class Condition(_Row):
    """One editing request c: image, mask, prompt.

    Shard keys: `<id>.image` (RGB), `<id>.mask` (L, 255 where pixels are to be made), and for procedural scenes or withheld
    pixels `<id>.target` (RGB, what a perfect edit looks like). `truth` holds a scene's facts (caption parts, boxes), else {}.
    """

    id: str
    source_id: str  # the source image; splits never cut through one
    task: str
    prompt: str
    split: Split
    kind: Literal["scene", "photo", "user"]
    mask_kind: MaskKind | Literal["given"] = "given"  # how the mask was made; `given` is the user's own
    truth: dict = {}
    tags: list[str] = []

    @property
    def origin(self) -> str:
        """What the source image is cut from, a photograph or a scene: crops of one photograph are no independent draws."""
        return self.truth.get("origin", self.source_id)


class Candidate(_Row):
    """One sampled answer to a condition, with every value that was drawn. Shard key: `<id>` (RGB)."""

    id: str  # "<condition_id>.<index>"
    condition_id: str
    index: int
    seed: int
    steps: int
    negative_prompt: str
    true_cfg: float
    guidance_scale: float
    strength: float  # initial noise strength in (0, 1]
    stop: int | None = None  # steps taken before x0 was predicted in one; None: all of them were taken
    scheduler: str
    model_digest: str


class Preference(_Row):
    """One annotator's best and worst of a condition's candidates on one dimension; `tie` when they hardly differ."""

    condition_id: str
    dimension: str
    annotator: str
    source: Literal["scripted", "import"]
    shown: list[str]  # candidate ids in the order shown
    best: str | None
    worst: str | None
    tie: bool = False

    @pydantic.model_validator(mode="after")
    def _coherent(self) -> Preference:
        if self.tie:
            if self.best is not None or self.worst is not None:
                raise ValueError("a tie names neither best nor worst")
        elif self.best is None or self.worst is None or self.best == self.worst:
            raise ValueError("best and worst must be two different candidates")
        elif not {self.best, self.worst} <= set(self.shown):
            raise ValueError("best and worst must be among the candidates shown")
        return self


class Pair(_Row):
    """A (winner, loser) pair for one dimension: the reward model's training row. Winner and loser are candidate ids."""

    condition_id: str
    task: str
    dimension: str
    prompt: str
    split: Split
    winner: str
    loser: str


Row = TypeVar("Row", bound=_Row)


def write_rows(path: Path, rows: Iterable[_Row]) -> None:
    """Write rows as JSON Lines (UTF-8, one object per line)."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json() + "\n")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read rows written by `write_rows`. Raises BadManifest naming the file and line."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(kind.model_validate(json.loads(line)))
            except (json.JSONDecodeError, pydantic.ValidationError) as error:
                raise BadManifest(f"{path}, line {number} is not a {kind.__name__}: {error}.", "Correct or remove that line.") from error
    return rows
