"""Pictures of the user's and the seed data: what is taken, what is refused and why."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.progress import Progress
from models.errors import BadManifest, NotEnoughData
from models.records import Source, read_rows
from models.shards import ShardReader
from ops.source import SourceConfig, source_images


def picture(seed: int, size: tuple[int, int] = (80, 64), mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def spot(size: tuple[int, int] = (80, 64)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (30, 20, 50, 40))
    return mask


def take(tmp_path: Path, path: Path | str, **values) -> tuple[list[Source], dict[str, str], ShardReader, dict]:
    out = tmp_path / "out"
    out.mkdir()
    metrics = source_images(SourceConfig(path=str(path), **values), out, Progress())
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return read_rows(out / "sources.jsonl", Source), {r["name"]: r["reason"] for r in rejected}, ShardReader(out), metrics


def test_a_folder_with_masks_and_captions(tmp_path):
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    picture(0).save(folder / "a.png")
    spot().save(folder / "a.mask.png")
    (folder / "a.txt").write_text("a cat\n")
    picture(1, mode="L").save(folder / "deeper" / "b.jpg")
    (folder / "notes.md").write_text("not a picture")
    rows, rejected, shards, metrics = take(tmp_path, folder)
    assert [(r.kind, r.caption, r.truth["origin"]) for r in rows] == [("user", "a cat", "user-a.png"), ("user", "", "user-deeper/b.jpg")]
    assert rejected == {} and metrics["sources"] == 2
    assert shards[f"{rows[0].id}.image"].size == (64, 64) and shards[f"{rows[1].id}.image"].mode == "RGB"
    assert (tmp_path / "out" / "pictures" / "sources.png").exists()
    assert set(np.unique(np.asarray(shards[f"{rows[0].id}.object"]))) == {0, 255} and f"{rows[1].id}.object" not in shards


def test_bad_files_are_refused_with_their_reason(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0).save(folder / "good.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:500])
    (folder / "text.jpg").write_text("hello")
    picture(1, (20, 90)).save(folder / "small.png")
    for name, mask in {"other": spot((70, 64)), "empty": Image.new("L", (80, 64), 0), "full": Image.new("L", (80, 64), 255)}.items():
        picture(len(name)).save(folder / f"{name}.png")
        mask.save(folder / f"{name}.mask.png")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "deep.png")
    outside = Image.new("L", (80, 64), 0)
    outside.paste(255, (0, 0, 5, 64))  # cut away by the centre crop
    picture(9).save(folder / "cropped.png")
    outside.save(folder / "cropped.mask.png")
    rows, rejected, _, metrics = take(tmp_path, folder)
    assert [r.truth["origin"] for r in rows] == ["user-good.png"]
    said = {
        "broken.png": "does not decode",
        "text.jpg": "does not decode",
        "small.png": "20x90",
        "other.png": "70x64",
        "empty.png": "is empty",
        "full.png": "is full",
        "deep.png": "colour mode",
        "cropped.png": "after the crop",
    }
    assert rejected.keys() == said.keys()
    assert all(said[name] in reason for name, reason in rejected.items())
    assert metrics["rejected_by_reason"] == {"BadImage": 4, "BadMask": 4}
    assert {row["name"]: row["reason"] for row in metrics["first_rejected"]} == rejected
    assert not any(str(tmp_path) in reason for reason in rejected.values())


def test_orientation_and_transparency(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    upright = Image.new("RGB", (64, 96), "blue")
    upright.paste((255, 0, 0), (0, 0, 64, 48))  # red above, blue below
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    upright.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / "glass.png")
    rows, _, shards, _ = take(tmp_path, folder, size=0)
    glass, turned = (shards[f"{r.id}.image"] for r in rows)
    assert glass.getpixel((5, 5)) == (255, 255, 255)
    assert turned.size == (64, 96) and turned.getpixel((5, 5)) == (255, 0, 0) and turned.getpixel((5, 90)) == (0, 0, 255)


def test_size_zero_keeps_the_size_on_the_grid(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0, (85, 70)).save(folder / "a.png")
    rows, _, shards, _ = take(tmp_path, folder, size=0)
    assert shards[f"{rows[0].id}.image"].size == (80, 64)


def test_a_manifest_names_its_bad_lines(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    picture(0).save(tmp_path / "secret.png")
    spot().save(folder / "m.png")
    lines = [
        '{"image": "a.png", "mask": "m.png", "prompt": "a hat", "task": "fill", "tags": ["x"]}',
        "not json",
        '{"image": "a.png", "task": "levitate"}',
        '{"image": "../secret.png"}',
        '{"image": "missing.png"}',
        '{"picture": "a.png"}',
        "",
        "[1]",
    ]
    (folder / "m.jsonl").write_text("\n".join(lines))
    rows, rejected, _, metrics = take(tmp_path, folder / "m.jsonl")
    assert [(r.task, r.caption, r.tags) for r in rows] == [("fill", "a hat", ["x"])]
    assert "line 2 is not JSON" in rejected["line 2"]
    assert "line 3" in rejected["line 3"] and "'levitate'" in rejected["line 3"]
    assert "outside" in rejected["line 4"] and "does not exist" in rejected["line 5"]
    assert "picture" in rejected["line 6"] and "line 8" in rejected
    assert metrics["rejected_by_reason"] == {"BadManifest": 4, "UnknownTask": 1, "BadImage": 1}


def test_nothing_to_work_with(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(NotEnoughData, match="no usable image"):
        take(tmp_path, tmp_path / "in")
    (tmp_path / "m.jsonl").write_text("oops\n")
    (tmp_path / "out").rmdir()
    with pytest.raises(NotEnoughData, match="line 1 is not JSON"):
        take(tmp_path, tmp_path / "m.jsonl")


def test_no_pictures_named_is_told_how_to_name_them(tmp_path):
    with pytest.raises(NotEnoughData, match=r"source_images: \{path: "):
        source_images(SourceConfig(n_scenes=0, crops_per_photo=0), tmp_path, Progress())


@pytest.mark.parametrize("name", ["absent", "absent.jsonl", "a.csv", "latin.jsonl"])
def test_a_path_that_is_no_source(tmp_path, name):
    (tmp_path / "a.csv").write_text("image\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(BadManifest, match=name):
        take(tmp_path, tmp_path / name)


def test_scenes_go_on_where_an_earlier_round_ended(tmp_path):
    pools = []
    for name, values in {"all": {"n_scenes": 6}, "later": {"n_scenes": 2, "first_scene": 4}}.items():
        (tmp_path / name).mkdir()
        rows, _, shards, _ = take(tmp_path / name, "", crops_per_photo=0, **values)
        pools.append({row.truth["origin"]: shards[f"{row.id}.image"].tobytes() for row in rows})
    assert len(pools[0]) == 6 and pools[1].items() <= pools[0].items() and set(pools[1]) == {"scene-000004", "scene-000005"}
    with pytest.raises(ValueError, match="go beyond a seed's 1,000,000 scenes"):
        SourceConfig(n_scenes=10, first_scene=999_995)


def test_seed_data_is_the_same_every_time(tmp_path):
    digests = []
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        rows, _, shards, metrics = take(tmp_path / run, "", n_scenes=6, crops_per_photo=2)
        assert metrics["by_kind"]["scene"] == 6 and metrics["by_kind"]["photo"] >= 10 and metrics["rejected"] == 0
        digests.append([shards[f"{r.id}.image"].tobytes() for r in rows])
        assert all(r.licence for r in rows)
        assert all(f"{r.id}.object" in shards and f"{r.id}.clean" in shards for r in rows if r.kind == "scene")
    assert digests[0] == digests[1]
    photos = [r for r in rows if r.kind == "photo"]
    assert len({r.truth["origin"] for r in photos}) == metrics["by_kind"]["photo"] / 2  # two crops share their photograph
