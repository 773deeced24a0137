"""Rows, shards and the taxonomy; a new task is an entry in a file."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import models.taxonomy
from infra.progress import Progress
from models.errors import BadImage, BadManifest, ConfigError, UnknownDimension, UnknownTask, UnknownVersion
from models.images import to_mask
from models.records import Condition, Preference, Source, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.curate import CurateConfig, curate
from ops.source import SourceConfig, source_images

SHIPPED = Path(models.taxonomy.__file__).with_name("taxonomy.yaml")


def edited(tmp_path: Path, change) -> Path:
    raw = yaml.safe_load(SHIPPED.read_text())
    change(raw)
    path = tmp_path / "taxonomy.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def test_rows_survive_the_file_and_bad_lines_are_named(tmp_path):
    rows = [Source(id="a", kind="user", caption="ä\n", truth={"box": [1, 2]}), Source(id="b", kind="scene", tags=["x"])]
    path = tmp_path / "sources.jsonl"
    write_rows(path, rows)
    assert read_rows(path, Source) == rows
    with path.open("a") as file:
        file.write('{"id": "c", "kind": "painting"}\n')
    with pytest.raises(BadManifest, match="line 3"):
        read_rows(path, Source)


@pytest.mark.parametrize(
    ("best", "worst", "tie"), [("a", "a", False), ("a", None, False), ("a", "b", True), (None, None, False), ("a", "stranger", False)]
)
def test_a_preference_must_be_coherent(best, worst, tie):
    with pytest.raises(ValueError):
        Preference(
            condition_id="c", dimension="structure", annotator="x", source="import", shown=["a", "b"], best=best, worst=worst, tie=tie
        )


def test_shards_give_back_every_picture_and_equal_bytes(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, shard_bytes=1500) as shards:
            for index in range(5):
                shards.add(f"c{index}.image", noise(index))
    paths = sorted((tmp_path / "1").iterdir())
    assert len(paths) > 1  # small shards, so several
    assert all(path.read_bytes() == (tmp_path / "2" / path.name).read_bytes() for path in paths)
    reader = ShardReader(tmp_path / "1")
    assert all(reader[f"c{index}.image"].tobytes() == noise(index).tobytes() for index in range(5))
    assert "c9.image" not in reader
    with pytest.raises(UnknownVersion, match="c9"):
        reader["c9.image"]


def test_a_cut_shard_is_named(tmp_path):
    with ShardWriter(tmp_path) as shards:
        for index in range(3):
            shards.add(f"c{index}", noise(index))
    path = tmp_path / "images-00000.tar"
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(BadImage, match=r"images-00000\.tar"):
        ShardReader(tmp_path)["c0"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_shard_holds_files_alone(tmp_path, kind):
    """Nothing is ever unpacked; a link or a folder in a shard is refused all the same."""
    info = tarfile.TarInfo("../../outside.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "images-00000.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(BadImage, match="outside"):
        ShardReader(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images-00000.tar"]


def test_the_shipped_taxonomy_is_the_papers():
    taxonomy = Taxonomy.load()
    assert [task.name for task in taxonomy.active] == ["fill", "text", "extend", "extend_free", "remove"]
    p = {task.name: task.probability for task in taxonomy.tasks}
    assert p["fill"] + p["text"] == 0.5 and p["extend"] + p["extend_free"] == 0.25 and p["remove"] == 0.25
    assert taxonomy.task("remove").dimensions == ("removal_quality",)
    assert "text_alignment" not in taxonomy.task("extend_free").dimensions  # there is no prompt to agree with


def test_a_single_kind_of_mask_is_a_list_of_one(tmp_path):
    listed = Taxonomy.load(edited(tmp_path, lambda raw: raw["tasks"]["text"].update(mask=["box"])))
    assert listed == Taxonomy.load() and listed.digest() == Taxonomy.load().digest()
    fewer = Taxonomy.load(edited(tmp_path, lambda raw: raw["tasks"]["fill"].update(mask="box")))
    assert fewer.task("fill").mask == ("box",) and fewer.digest() != listed.digest()


def test_the_query_reads_the_prompt_only_where_the_dimension_does():
    taxonomy = Taxonomy.load()
    assert "a red hat" in taxonomy.query("fill", "text_alignment", "a red hat")
    assert "a red hat" not in taxonomy.query("fill", "structure", "a red hat")
    assert len({taxonomy.query(task, dimension, "p") for task, dimension in taxonomy.cells}) == len(taxonomy.cells)
    with pytest.raises(UnknownDimension, match="removal_quality"):
        taxonomy.query("remove", "structure")
    with pytest.raises(UnknownTask, match="levitate"):
        taxonomy.query("levitate", "structure")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["tasks"]["fill"].update(probability=0.9), "add up to"),
        (lambda raw: raw["tasks"]["fill"].update(dimensions=["charm"]), "charm"),
        (lambda raw: raw["tasks"]["fill"].update(fixed_prompt="x"), "fixed_prompt"),
        (lambda raw: raw["tasks"]["fill"].update(mask="lasso"), "mask"),
        (lambda raw: raw["tasks"]["fill"].update(mask=["box", "lasso"]), "mask"),
        (lambda raw: raw["tasks"]["fill"].update(mask=[]), "mask"),
        (lambda raw: raw.pop("query"), "query"),
    ],
)
def test_a_contradictory_taxonomy_is_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        Taxonomy.load(edited(tmp_path, change))


def test_background_replacement_is_an_entry_not_code(tmp_path):
    def add(raw: dict) -> None:
        raw["tasks"]["fill"]["probability"] = 0.15
        raw["tasks"]["new_background"] = {
            "title": "Background replacement",
            "probability": 0.10,
            "mask": "background",
            "prompt": "caption",
            "condition": "background",
            "dimensions": ["consistency", "text_alignment"],
        }

    taxonomy = Taxonomy.load(edited(tmp_path, add))
    (tmp_path / "sources").mkdir()
    (tmp_path / "curated").mkdir()
    source_images(SourceConfig(n_scenes=30, crops_per_photo=0), tmp_path / "sources", Progress())
    config = CurateConfig(train_per_task=4, validation_per_task=2, test_per_task=2)
    metrics = curate(config, tmp_path / "sources", tmp_path / "curated", Progress(), lambda images: images.flatten(1), taxonomy)
    assert metrics["per_task"]["new_background"] == {"train": 4, "validation": 2, "test": 2}
    shards, sources = ShardReader(tmp_path / "curated"), ShardReader(tmp_path / "sources")
    for row in read_rows(tmp_path / "curated" / "conditions.jsonl", Condition):
        if row.task == "new_background":
            made = to_mask(shards[f"{row.id}.mask"])
            kept = to_mask(sources[f"{row.source_id}.object"])
            assert (made + kept == 1).all() and row.prompt  # all but the object is to be made
            assert row.mask_kind == "background"
            assert "Background replacement" in taxonomy.query(row.task, "text_alignment", row.prompt)
    assert (tmp_path / "curated" / "pictures" / "examples-new_background.png").exists()
