"""Take pictures in: check each, bring it to size, and list what was refused and why.

    from ops.source import SourceConfig, source_images
    source_images(SourceConfig(path="photos"), out, Progress(print))

`path` is a folder of images (with optional `<stem>.mask.png` and `<stem>.txt` beside them), a JSONL manifest with one
`{"image": .., "mask": .., "prompt": .., "task": .., "tags": [..]}` a line (only `image` is required; paths are relative to
the manifest and stay in its folder), or empty for the seed data. A bad row is refused with its reason, never fatal; having
nothing left is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from PIL import Image, ImageOps

from infra.progress import Progress
from models.config import OpConfig
from models.errors import BadImage, BadManifest, BadMask, NotEnoughData, OneRewardError
from models.masks import check_mask
from models.mini.photos import PHOTOGRAPHS, photo_crops
from models.mini.scenes import render_scene
from models.records import Source, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.pictures import grid, overlay

GRID = 16  # the VAE's factor 8 times FLUX's 2x2 packing: every side must be a multiple
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MASK_SUFFIX = ".mask.png"
SHEET_ROWS, SHEET_COLUMNS = 3, 10  # of each kind, in the picture
LISTED = 20  # rejected rows in the metrics, of all that rejected.jsonl holds
SEED_SIZE = 64  # seed data has no size of its own to keep
SCENES_PER_SEED = 1_000_000  # before two seeds meet


class SourceConfig(OpConfig):
    """Where pictures come from and what they must be."""

    path: str = pydantic.Field("", description="Folder of images or JSONL manifest; empty for the seed data (ours).")
    size: int = pydantic.Field(
        64, ge=0, multiple_of=GRID, description="Side in px after centre crop and Lanczos; 0 keeps the size, cut to multiples of 16 (ours)."
    )
    min_size: int = pydantic.Field(32, ge=1, description="A picture with a shorter side is refused, px (ours).")
    n_scenes: int = pydantic.Field(400, ge=0, description="Procedural scenes in the seed data (ours).")
    first_scene: int = pydantic.Field(
        0, ge=0, description="Number of the first of them: a further round has scenes that no round before it has seen (ours)."
    )
    crops_per_photo: int = pydantic.Field(16, ge=0, description="Crops of each real photograph in the seed data (ours).")
    seed: int = pydantic.Field(
        0, ge=0, lt=10, description="Seed of scenes and crops; beyond 9 begin the scenes that the mini base has learned from (ours)."
    )

    @pydantic.model_validator(mode="after")
    def _before_the_next_seed(self) -> SourceConfig:
        if self.first_scene + self.n_scenes > SCENES_PER_SEED:
            raise ValueError(f"first_scene {self.first_scene} and n_scenes {self.n_scenes} go beyond a seed's {SCENES_PER_SEED:,} scenes")
        return self


class _Line(pydantic.BaseModel):
    """One line of a manifest."""

    model_config = pydantic.ConfigDict(extra="forbid")

    image: str
    mask: str | None = None
    prompt: str = ""
    task: str | None = None
    tags: list[str] = []


@dataclass
class _Taken:
    """A picture that passed: its row and what goes into the shards, by key ending."""

    row: Source
    pictures: dict[str, Image.Image]


@dataclass
class _Refused:
    name: str
    reason: str


def source_images(config: SourceConfig, out: Path, progress: Progress, taxonomy: Taxonomy | None = None) -> dict[str, Any]:
    """Write `sources.jsonl`, `rejected.jsonl`, shards, a picture and `metrics.json` into `out`; return the metrics.

    Raises BadManifest for a path that is neither a folder nor a manifest, NotEnoughData when no picture is left.
    """
    rows: list[Source] = []
    refused: list[_Refused] = []
    items, total = _items(config, taxonomy or Taxonomy.load())
    with ShardWriter(out) as shards, progress.bar("source images", total, "image") as bar:
        for item in items:
            if isinstance(item, _Refused):
                refused.append(item)
            else:
                rows.append(item.row)
                for ending, picture in item.pictures.items():
                    shards.add(f"{item.row.id}.{ending}", picture)
            bar.advance()
    if not rows:
        first = f" First reason: {refused[0].name}: {refused[0].reason}" if refused else ""
        if config.path:
            remedy = "Add images (PNG, JPEG, WebP), or correct the rejected ones."
        else:
            remedy = "Name a folder of images or a JSONL manifest in a preset of your own: `source_images: {path: ...}`."
        raise NotEnoughData(f"{config.path or 'The seed data'} holds no usable image.{first}", remedy)
    write_rows(out / "sources.jsonl", rows)
    (out / "rejected.jsonl").write_text("".join(json.dumps({"name": r.name, "reason": r.reason}) + "\n" for r in refused))
    if refused:
        progress.say(f"{len(refused)} rejected, first {refused[0].name}: {refused[0].reason}")
    save_picture(out, "sources", _contact_sheet(rows, ShardReader(out)))
    metrics = {
        "sources": len(rows),
        "by_kind": dict(Counter(row.kind for row in rows)),
        "licences": dict(Counter(row.licence for row in rows if row.licence)),
        "rejected": len(refused),
        "rejected_by_reason": dict(Counter(r.reason.split(":")[0] for r in refused)),
        "first_rejected": [{"name": r.name, "reason": r.reason} for r in refused[:LISTED]],
    }
    write_metrics(out, metrics)
    return metrics


def _contact_sheet(rows: list[Source], shards: ShardReader) -> Image.Image:
    """Some pictures of every kind, at even distances in the pool; a user's mask is laid over its picture."""
    table: list[list[Image.Image | None]] = []
    captions = []
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        count = min(len(mine), SHEET_ROWS * SHEET_COLUMNS)
        shown = [mine[index * len(mine) // count] for index in range(count)]
        pictures: list[Image.Image | None] = [
            overlay(shards[f"{row.id}.image"], shards[f"{row.id}.object"])
            if kind == "user" and f"{row.id}.object" in shards
            else shards[f"{row.id}.image"]
            for row in shown
        ]
        pictures += [None] * (-len(pictures) % SHEET_COLUMNS)
        table += [pictures[start : start + SHEET_COLUMNS] for start in range(0, len(pictures), SHEET_COLUMNS)]
        captions += [f"{kind}: {count} of {len(mine)}", *[""] * (len(pictures) // SHEET_COLUMNS - 1)]
    return grid(table, columns=[""] * SHEET_COLUMNS, captions=captions, cell=64)


def _items(config: SourceConfig, taxonomy: Taxonomy) -> tuple[Iterator[_Taken | _Refused], int]:
    if not config.path:
        return _seed_items(config), config.n_scenes + config.crops_per_photo * len(PHOTOGRAPHS)
    path = Path(config.path)
    if path.is_dir():
        names = sorted(
            p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.endswith(MASK_SUFFIX)
        )
        return _folder_items(config, path, names), len(names)
    if not path.exists():
        raise BadManifest(f"{path} does not exist.", "Give a folder of images or a JSONL manifest.")
    if path.suffix != ".jsonl":
        raise BadManifest(f"{path} is neither a folder nor a .jsonl manifest.", "Give a folder of images or a JSONL manifest.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadManifest(f"{path} is not UTF-8 text.", "Save the manifest as UTF-8, one JSON object a line.") from error
    return _manifest_items(config, path.parent, lines, taxonomy), len(lines)


def _seed_items(config: SourceConfig) -> Iterator[_Taken]:
    size = config.size or SEED_SIZE
    for index in range(config.first_scene, config.first_scene + config.n_scenes):
        scene = render_scene(config.seed * SCENES_PER_SEED + index, size)
        name = f"scene-{index:06d}"
        row = Source(
            id=name, kind="scene", caption=scene.caption, words=scene.words, licence="generated", truth={**scene.truth, "origin": name}
        )
        pictures = {"image": scene.image, "object": scene.object_mask, "clean": scene.clean}
        yield _Taken(row, pictures | ({"words": scene.words_mask} if scene.words_mask else {}))
    for photo in photo_crops(size, config.crops_per_photo, config.seed):
        origin = f"photo-{photo.name}"
        row = Source(
            id=f"{origin}-{photo.index:03d}",
            kind="photo",
            caption=photo.caption,
            licence=photo.licence,
            truth={"origin": origin},
            tags=[origin],
        )
        yield _Taken(row, {"image": photo.image})


def _folder_items(config: SourceConfig, folder: Path, names: list[str]) -> Iterator[_Taken | _Refused]:
    for index, name in enumerate(names):
        stem = (folder / name).with_suffix("")
        mask, caption = stem.with_name(stem.name + MASK_SUFFIX), stem.with_name(stem.name + ".txt")
        line = _Line(
            image=name,
            mask=mask.relative_to(folder).as_posix() if mask.exists() else None,
            prompt=caption.read_text(encoding="utf-8", errors="replace").strip() if caption.exists() else "",
        )
        yield _taken(config, folder, line, index, name)


def _manifest_items(config: SourceConfig, folder: Path, lines: list[str], taxonomy: Taxonomy) -> Iterator[_Taken | _Refused]:
    known = {task.name for task in taxonomy.tasks}
    for index, text in enumerate(lines):
        if not text.strip():
            continue
        name = f"line {index + 1}"
        try:
            line = _Line.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            yield _Refused(name, f"BadManifest: line {index + 1} is not JSON ({error.msg} at column {error.colno}).")
            continue
        except pydantic.ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in error.errors())
            yield _Refused(name, f"BadManifest: line {index + 1} is not a row ({wrong}).")
            continue
        if line.task is not None and line.task not in known:
            yield _Refused(
                name, f"UnknownTask: line {index + 1} asks for the unknown task {line.task!r}; known are {', '.join(sorted(known))}."
            )
            continue
        yield _taken(config, folder, line, index, name)


def _taken(config: SourceConfig, folder: Path, line: _Line, index: int, name: str) -> _Taken | _Refused:
    """Read, check and bring to size one picture of the user's, or say why not."""
    try:
        image = read_image(_inside(folder, line.image), line.image)
        if min(image.size) < config.min_size:
            raise BadImage(f"{line.image} is {image.width}x{image.height}, under {config.min_size} px.", "Use a larger picture.")
        pictures = {"image": _to_size(image.convert("RGB"), config.size, Image.Resampling.LANCZOS)}
        if line.mask is not None:
            mask = check_mask(read_image(_inside(folder, line.mask), line.mask), image.size, line.image)
            mask = _to_size(mask, config.size, Image.Resampling.NEAREST)
            if mask.getextrema() != (0, 255):
                raise BadMask(f"The mask of {line.image} is empty or full after the crop to size.", "Use a picture nearer to a square.")
            pictures["object"] = mask
    except OneRewardError as error:
        return _Refused(name, f"{type(error).__name__}: {error.what}")
    origin = f"user-{Path(line.image).as_posix()}"
    row = Source(id=f"user-{index:06d}", kind="user", caption=line.prompt, task=line.task, truth={"origin": origin}, tags=line.tags)
    return _Taken(row, pictures)


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadManifest(f"{name} lies outside the manifest's folder.", "Copy it into the folder and name it by a relative path.")
    return path


def read_image(path: Path, name: str) -> Image.Image:
    """The picture with its EXIF orientation applied, transparency laid on white. Raises BadImage naming `name`."""
    if not path.is_file():
        raise BadImage(f"{name} does not exist.", "Correct the path or remove the row.")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow reports broken PNG chunks as SyntaxError
        raise BadImage(f"{name} does not decode as an image.", "Remove the file or save it again as PNG.") from error
    if image.mode[0] in "IF":
        raise BadImage(f"{name} has colour mode {image.mode}, not 8 bits per channel.", "Save it as 8-bit RGB.")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image


def _to_size(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    if size:
        return ImageOps.fit(image, (size, size), filter)
    width, height = (side // GRID * GRID for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
