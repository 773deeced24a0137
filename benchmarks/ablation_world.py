"""What all arms of one seed share: data, labels, pairs and the default judge, and how judges and policies are made and measured, all by
the chain's own operations under a preset.

    world = World(Path("work/3"), "mini", seed=3, progress=Progress(print))
    world.pairs, world.test_pairs, world.reward_model

Each is a folder that is there whole or not at all, so an interrupted seed goes on where it stood. Every method raises ConfigError for a
section of the preset that is not valid, and what the operation behind it raises.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from PIL import Image

from assets.settings import reasons
from benchmarks.run import write_seeded
from infra.data import weights
from infra.progress import Progress
from infra.stores.base import directory_digest
from models.config import OpConfig
from models.errors import ConfigError
from models.judge import Judge
from models.masks import binary
from models.records import Candidate, Pair, read_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.curate import OWN, CurateConfig, curate
from ops.embed import clip_embedder, vae_embedder
from ops.evaluate import EvaluateConfig, evaluate
from ops.fit_reward import FitRewardConfig, fit_reward
from ops.generate import GenerateConfig, generate
from ops.judge_accuracy import judge_accuracy
from ops.label import LabelConfig, label_scripted
from ops.pair import PairConfig, make_pairs
from ops.pictures import overlay
from ops.policy_config import TrainPolicyConfig
from ops.source import SourceConfig, source_images
from ops.train_policy import Trainer, train_policy
from pipelines.config import load_settings

ROOT = Path(__file__).parents[1]
Config = TypeVar("Config", bound=OpConfig)


class World:
    """One seed's folder. Raises ConfigError where it was begun with another preset."""

    def __init__(self, folder: Path, preset: str, seed: int, progress: Progress):
        self.folder, self.seed, self.progress = folder, seed, progress
        folder.mkdir(parents=True, exist_ok=True)
        write_seeded(preset, seed, folder / "preset.yaml")
        self.settings = load_settings(str(folder / "preset.yaml"))
        resolved, known = self.settings.model_dump_json(indent=2), folder / "settings.json"
        if known.exists() and known.read_text() != resolved:
            raise ConfigError(f"{folder} was begun with another preset than {preset!r}.", "Name another folder with --work.")
        known.write_text(resolved)
        self.taxonomy = Taxonomy.load(ROOT / self.settings.taxonomy if self.settings.taxonomy else None)
        self.base, self.base_judge = weights(self.settings.flux, ROOT), weights(self.settings.judge, ROOT)

    def config(self, kind: type[Config], stage: str, **changes: object) -> Config:
        """The preset's configuration of a stage with this seed and `changes`. Raises ConfigError."""
        try:
            return kind(**{**self.settings.stages.get(stage, {}), **changes})
        except pydantic.ValidationError as error:
            raise ConfigError(f"{stage} cannot be run so: {reasons(error)}.", "Use a preset in which these values are possible.") from error

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder beside the others, gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="draft-") as place:
            yield Path(place)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        place = self.folder / name
        if not place.exists():
            with self.draft() as draft:
                (draft / name).mkdir()
                make(draft / name)
                (draft / name).rename(place)
        return place

    @cached_property
    def curated(self) -> Path:
        config = self.config(CurateConfig, "curated_dataset")
        embed = vae_embedder(self.base) if config.embedder == OWN else clip_embedder(weights(config.embedder, ROOT))
        sources = self._made(
            "sources", lambda out: source_images(self.config(SourceConfig, "source_images"), out, self.progress, self.taxonomy)
        )
        return self._made("curated", lambda out: curate(config, sources, out, self.progress, embed, self.taxonomy))

    @cached_property
    def candidates(self) -> Path:
        config, models = self.config(GenerateConfig, "candidates"), {directory_digest(self.base)[0]: self.base}
        return self._made("candidates", lambda out: generate(config, models, self.curated, out, self.progress, self.taxonomy))

    def label(self, taxonomy: Taxonomy, out: Path) -> None:
        """Write into `out` the pairs of an annotator who ranks the candidates by this taxonomy's measures."""
        shown = self.curated, self.candidates
        with self.draft() as labels:
            label_scripted(self.config(LabelConfig, "preferences"), *shown, [], taxonomy, labels, self.progress)
            make_pairs(self.config(PairConfig, "preference_pairs"), *shown, labels, out, self.progress, taxonomy)

    @cached_property
    def pairs(self) -> Path:
        return self._made("pairs", lambda out: self.label(self.taxonomy, out))

    @cached_property
    def test_pairs(self) -> list[Pair]:
        """The sealed split's pairs, on which the annotator never errs."""
        return [pair for pair in read_rows(self.pairs / "pairs.jsonl", Pair) if pair.split == "test"]

    @property
    def fitting(self) -> FitRewardConfig:
        """The preset's, without a second judge: it would double the time and take labels away from the one that is measured."""
        return self.config(FitRewardConfig, "reward_model", second_share=0.0)

    def fit(self, pairs: Path, out: Path) -> None:
        """Write into `out` a judge fitted to these pairs as the preset has it."""
        fit_reward(self.fitting, self.base_judge, self.curated, self.candidates, pairs, out, self.progress, self.taxonomy)

    def accuracy(self, judge: Judge, pairs: list[Pair], *, config: FitRewardConfig, shown: tuple[Path, Path]) -> dict[str, Any]:
        """How often a judge agrees with these pairs (ops/judge_accuracy.py). `shown`: curated dataset and candidates."""
        settings: dict[str, Any] = {"batch_size": config.batch_size, "progress": self.progress, "paste_source": config.paste_source}
        return judge_accuracy(judge, judge.taxonomy, pairs, *shown, **settings)

    @cached_property
    def reward_model(self) -> Path:
        """The default judge, which rewards the policies."""
        return self._made("reward_model", lambda out: self.fit(self.pairs, out))

    def train(
        self,
        config: TrainPolicyConfig,
        judge: Path,
        out: Path,
        taxonomy: Taxonomy,
        mode: str = "static",
        make_trainer: Callable[..., Trainer] | None = None,
    ) -> dict[str, Any]:
        """Train a policy on `judge` into `out` and return the training's metrics."""
        with self.draft() as scratch:
            return train_policy(config, self.base, judge, self.curated, out, self.progress, taxonomy, mode, scratch, make_trainer)

    def evaluate(self, policy: Path, out: Path, taxonomy: Taxonomy) -> dict[str, Any]:
        """Compare a policy with the base on the test conditions, records into `out`, and return its figures."""
        config, shown = self.config(EvaluateConfig, "evaluation"), (self.base, self.curated, self.reward_model)
        return evaluate(config, *shown, {"policy": policy}, out, self.progress, taxonomy=taxonomy)["policy"]["policy"]


def beside_source(world: World, out: Path) -> tuple[Path, Path, Path]:
    """Base judge, curated data and candidates in which every edit stands above its source, what was to be made tinted there.

    The pictures are twice as high, so the judge's limits of size are doubled: it sees the edit in as many pixels as before.
    """
    judge, curated, candidates = (out / name for name in ("judge", "curated", "candidates"))
    shutil.copytree(world.base_judge, judge)
    limits = judge / "preprocessor_config.json"
    processing = json.loads(limits.read_text())
    limits.write_text(json.dumps({**processing, "size": {edge: 2 * pixels for edge, pixels in processing["size"].items()}}))
    curated.mkdir()
    candidates.mkdir()
    shutil.copy(world.curated / "conditions.jsonl", curated)
    shutil.copy(world.candidates / "candidates.jsonl", candidates)
    known, made = ShardReader(world.curated), ShardReader(world.candidates)
    with ShardWriter(curated) as sources, ShardWriter(candidates) as edits:
        asked: dict[str, Image.Image] = {}
        for row in read_rows(candidates / "candidates.jsonl", Candidate):
            source, mask = known[f"{row.condition_id}.image"], known[f"{row.condition_id}.mask"]
            if row.condition_id not in asked:
                asked[row.condition_id] = overlay(source, mask)
                sources.add(f"{row.condition_id}.image", _above(source, asked[row.condition_id]))
            edits.add(row.id, _above(Image.composite(made[row.id], source, binary(mask)), asked[row.condition_id]))
    return judge, curated, candidates


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    stack = Image.new("RGB", (upper.width, upper.height + lower.height))
    stack.paste(upper, (0, 0))
    stack.paste(lower, (0, upper.height))
    return stack
