"""Copies, the diverse subset, splits that leak nothing, and the conditions made from what is left."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from infra.progress import Progress
from models.errors import BrokenWeights, MissingWeights, NotEnoughData
from models.images import to_mask, to_tensor
from models.records import SPLITS, Condition, Source, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.curate import CurateConfig, curate, leaked_sources, split_by_origin
from ops.embed import clip_embedder, vae_embedder
from ops.source import SourceConfig, source_images


def colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


@pytest.fixture(scope="module")
def seed_data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sources")
    source_images(SourceConfig(n_scenes=40, crops_per_photo=4), out, Progress())
    return out


def run(
    sources: Path, out: Path, taxonomy: Taxonomy | None = None, embed=colours, **values
) -> tuple[list[Condition], dict, dict[str, str]]:
    out.mkdir()
    settings = {"train_per_task": 8, "validation_per_task": 3, "test_per_task": 3, **values}
    metrics = curate(CurateConfig(**settings), sources, out, Progress(), embed, taxonomy)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return read_rows(out / "conditions.jsonl", Condition), metrics, {r["name"]: r["reason"] for r in rejected}


def test_seed_data_serves_every_task_in_every_split(seed_data, tmp_path):
    rows, metrics, _ = run(seed_data, tmp_path / "out")
    for task in Taxonomy.load().active:
        assert metrics["per_task"][task.name] == {"train": 8, "validation": 3, "test": 3}
    shards = ShardReader(tmp_path / "out")
    for row in rows:
        image, mask, target = (shards[f"{row.id}.{ending}"] for ending in ("image", "mask", "target"))
        inside = to_mask(mask).bool().expand(3, -1, -1)
        if row.task == "remove":
            changed = (to_tensor(image) != to_tensor(target)).any(0)
            assert changed.any() and not (changed & ~inside[0]).any()  # the whole object is inside its mask
        else:
            assert image.tobytes() == target.tobytes()
        assert 0 < to_mask(mask).mean() < 1
    texts = [row for row in rows if row.task == "text"]
    assert all(row.prompt == f'the word "{row.truth["word"]["text"]}"' for row in texts)
    assert max(np.unique([row.source_id for row in rows], return_counts=True)[1]) <= 2
    assert all(path.stat().st_size < 200_000 for path in (tmp_path / "out" / "pictures").iterdir())
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == len(Taxonomy.load().active)
    assert set(metrics["masks"]["fill"]) == {"box", "brush"} and sum(metrics["masks"]["fill"].values()) == 14
    assert metrics["left_out"] == 0  # nothing was embedded


def test_no_origin_and_no_pixels_in_two_splits(seed_data, tmp_path):
    rows, metrics, _ = run(seed_data, tmp_path / "out", train_per_task=30, validation_per_task=30, test_per_task=30)
    assert metrics["leaked_sources"] == []
    splits: dict[str, set] = {}
    for row in rows:
        splits.setdefault(row.truth["origin"], set()).add(row.split)
    assert all(len(where) == 1 for where in splits.values())
    assert {where.copy().pop() for origin, where in splits.items() if origin.startswith("photo")} == {"train", "validation", "test"}


def test_each_rotation_seals_other_sources(seed_data):
    rows = read_rows(seed_data / "sources.jsonl", Source)

    def of(rotation: int) -> dict[str, set[str]]:
        splits = split_by_origin(CurateConfig(rotation=rotation), rows)
        return {split: {origin for origin, found in splits.items() if found == split} for split in SPLITS}

    assert of(0) == of(0) == of(5)  # a fifth is sealed: five rounds are one turn
    for rotation in range(5):
        now, after = of(rotation), of(rotation + 1)
        assert after["test"] <= now["train"] and now["test"] == after["validation"]
        assert {split: len(found) for split, found in now.items()} == {split: len(found) for split, found in after.items()}
    assert set.union(*(of(rotation)["test"] for rotation in range(5))) == set.union(*of(0).values())


def test_a_leak_is_seen(seed_data, tmp_path):
    rows, _, _ = run(seed_data, tmp_path / "out", tasks_per_source=2)
    twice = next(a for a in rows for b in rows if a.source_id == b.source_id and a.id != b.id and a.split == "train")
    moved = [row.model_copy(update={"split": "test"}) if row.id == twice.id else row for row in rows]
    write_rows(tmp_path / "out" / "conditions.jsonl", moved)
    assert twice.truth["origin"] in leaked_sources(tmp_path / "out")
    renamed = [row.model_copy(update={"truth": {"origin": "another"}}) if row.id == twice.id else row for row in moved]
    write_rows(tmp_path / "out" / "conditions.jsonl", renamed)
    assert leaked_sources(tmp_path / "out")  # the pixels give it away


def test_equal_seeds_curate_equally(seed_data, tmp_path):
    bytes_of = []
    for name, seed in (("1", 0), ("2", 0), ("3", 1)):
        run(seed_data, tmp_path / name, subset=30, clusters=4, seed=seed)
        bytes_of.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()})
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def save_sources(folder: Path, pictures: list[tuple[Image.Image, dict]]) -> Path:
    folder.mkdir()
    rows = []
    with ShardWriter(folder) as shards:
        for index, (image, values) in enumerate(pictures):
            row = Source(
                **{"id": f"user-{index:06d}", "kind": "user", "caption": "a thing", "truth": {"origin": f"user-{index}.png"}, **values}
            )
            rows.append(row)
            shards.add(f"{row.id}.image", image)
            if row.task:
                mask = Image.new("L", image.size, 0)
                mask.paste(255, (8, 8, 20 + index, 24))
                shards.add(f"{row.id}.object", mask)
    write_rows(folder / "sources.jsonl", rows)
    return folder


def noise(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


def test_copies_and_look_alikes_are_dropped(tmp_path):
    brighter = noise(0).point(lambda value: min(255, value + 6))
    recoloured = Image.merge("RGB", noise(0).split()[::-1])
    sources = save_sources(
        tmp_path / "in",
        [(noise(0), {}), (noise(1), {}), (noise(0), {}), (brighter, {}), (recoloured, {}), (noise(2), {}), (noise(3), {})],
    )
    rows, metrics, rejected = run(sources, tmp_path / "out")
    assert rejected["user-000002"] == "Copy: equal to user-000000."
    assert rejected["user-000003"] == "Look-alike: of user-000000."
    assert metrics["rejected_by_reason"] == {"Copy": 1, "Look-alike": 1}
    assert "user-000004" in {row.source_id for row in rows}


def test_one_file_listed_for_two_requests_stays_in_one_split(tmp_path):
    same = {"truth": {"origin": "user-0.png"}}
    pictures = [(noise(0), {**same, "task": "fill", "caption": "a hat"}), (noise(0), {**same, "task": "text", "caption": 'a sign "EXIT"'})]
    pictures += [(noise(seed), {"task": "remove"}) for seed in range(1, 9)]
    rows, _, rejected = run(save_sources(tmp_path / "in", pictures), tmp_path / "out")
    first, second = (row for row in rows if row.source_id in ("user-000000", "user-000001"))
    assert rejected == {} and first.split == second.split
    assert {(row.task, row.prompt) for row in (first, second)} == {("fill", "a hat"), ("text", 'a sign "EXIT"')}
    shards = ShardReader(tmp_path / "out")
    assert to_mask(shards[f"{first.id}.mask"]).sum() in (16 * 12, 16 * 13)  # the user's own mask, untouched
    assert not any(f"{row.id}.target" in shards for row in rows if row.task == "remove")  # nobody knows what is behind


def test_the_subset_takes_from_every_cluster(tmp_path):
    def plain(level: int, seed: int) -> Image.Image:
        return Image.fromarray((np.asarray(noise(seed), np.float32) * 0.2 + level).astype(np.uint8))

    pictures = [(plain(20, seed), {}) for seed in range(20)] + [(plain(110, 30), {}), (plain(111, 31), {}), (plain(200, 32), {})]
    rows, metrics, _ = run(save_sources(tmp_path / "in", pictures), tmp_path / "out", subset=6, clusters=3, tasks_per_source=3)
    assert metrics["chosen"] == 6 and metrics["left_out"] == 17
    assert {"choice", "clusters"} <= {path.stem for path in (tmp_path / "out" / "pictures").iterdir()}
    assert {"user-000020", "user-000021", "user-000022"} <= {row.source_id for row in rows}


def test_useless_pictures_are_named_and_too_few_refused(tmp_path):
    pictures = [(noise(seed), {"caption": "", "task": "fill"}) for seed in range(2)] + [(noise(seed), {}) for seed in range(2, 8)]
    _, metrics, rejected = run(save_sources(tmp_path / "in", pictures), tmp_path / "out")
    assert "cannot serve fill" in rejected["user-000000"] and metrics["rejected_by_reason"]["Useless"] == 2
    with pytest.raises(NotEnoughData, match="validation"):
        run(save_sources(tmp_path / "two", [(noise(0), {}), (noise(1), {})]), tmp_path / "none")


def test_shares_must_leave_a_test_split():
    with pytest.raises(ValueError, match="leave nothing"):
        CurateConfig(train_share=0.8, validation_share=0.2)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with `vae/`, as a base has one, and `clip/`, a whole CLIP checkpoint of which the vision tower is wanted."""
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "vae")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=8, **size)
    CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **size))).save_pretrained(
        tmp_path / "clip"
    )
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "clip")
    return tmp_path


def test_both_embedders_tell_pictures_apart(checkpoints):
    images = torch.stack([to_tensor(noise(0)), to_tensor(noise(1)), to_tensor(noise(0))])
    for embed, width in ((vae_embedder(checkpoints), 8), (clip_embedder(checkpoints / "clip"), 16)):
        vectors = embed(images)
        assert vectors.shape == (3, width) and not vectors.requires_grad
        torch.testing.assert_close(vectors[0], vectors[2])
        assert (vectors[0] - vectors[1]).abs().max() > 1e-4


def test_an_embedder_that_cannot_be_loaded_is_named(checkpoints):
    for load in (vae_embedder, clip_embedder):
        with pytest.raises(MissingWeights, match="nowhere"):
            load(checkpoints / "nowhere")
    for load, folder, name in ((vae_embedder, checkpoints, "vae"), (clip_embedder, checkpoints / "clip", "clip")):
        file = next((checkpoints / name).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(BrokenWeights, match=f"{name}/{file.name} is cut or altered"):
            load(folder)
    file.rename(file.with_name("pytorch_model.bin"))  # the last one: CLIP's
    with pytest.raises(MissingWeights, match=r"clip/\*\.safetensors is not there.* checkpoint with safetensors"):
        clip_embedder(checkpoints / "clip")
