"""Fit the judge to preference pairs (arXiv 2508.21066, section 3.1).

    fit_reward(FitRewardConfig(steps=700, learning_rate=3e-4), base_judge, curated, candidates, pairs, out, Progress(print))

Minimises L = -1/2 E[ log P(Yes | winner, loser, q) + log P(No | loser, winner, q) ] over the training split, stops when the accuracy on
the validation split no longer rises, and keeps the best weights; the base judge, at step 0, is the first contender. Writes model/ (merged
when LoRA, with its processor), adapter/ (LoRA only), curve.jsonl, accuracy.jsonl (validation pairs, both orders, base and fitted),
metrics.json and pictures/. With `second_share` the labels of some source images go to a second judge alone (second/), which never rewards:
it watches the policy in training. Validation pairs are of this round alone, training pairs of `earlier` rounds too. Nothing outside `out`
is touched, so an interrupted run leaves nothing behind. One process and one device: the vision tower is called apart from the language
model, which data-parallel wrappers do not follow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import peft
import pydantic
import torch
from torch import Tensor

from infra.progress import Progress
from models.config import OpConfig
from models.device import default_device
from models.errors import BrokenWeights, NotEnoughData
from models.judge import Judge, pair_loss
from models.records import Condition, Pair, read_rows
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.judge_accuracy import PairImages, ask, both_orders, cell_means, decisions, mean_over_cells, origins_of, pair_rows, summarise
from ops.pictures import curves, rates

SECOND = "second"  # folder of the judge that watches

Round = tuple[Path, Path, Path]  # the artifacts curated_dataset, candidates and preference_pairs that belong together
Shown = tuple[PairImages, Pair]  # a pair and where its pictures are: candidates of two rounds may have one name
Item = TypeVar("Item")


class FitRewardConfig(OpConfig):
    """How the judge is fitted."""

    steps: int = pydantic.Field(2000, ge=1, description="Optimizer steps at most (ours).")
    batch_size: int = pydantic.Field(16, ge=1, description="Pairs per step, each in both orders (paper: 16).")
    micro_batch: int = pydantic.Field(0, ge=0, description="Pairs per forward pass, gradients added up; 0 takes the whole batch (ours).")
    learning_rate: float = pydantic.Field(1e-6, gt=0, description="Peak learning rate of AdamW (paper: 1e-6).")
    warmup_steps: int = pydantic.Field(50, ge=0, description="Steps of linear rise before the linear fall to zero (ours).")
    weight_decay: float = pydantic.Field(0.01, ge=0, description="AdamW's decoupled weight decay (ours).")
    max_grad_norm: float = pydantic.Field(1.0, gt=0, description="Gradient norm is clipped to this (ours).")
    lora_rank: int = pydantic.Field(0, ge=0, description="Rank of LoRA on every linear layer; 0 trains all weights (ours).")
    lora_alpha: int = pydantic.Field(32, ge=1, description="LoRA's scale times its rank (ours).")
    eval_every: int = pydantic.Field(50, ge=1, description="Steps between accuracies on the validation split (ours).")
    patience: int = pydantic.Field(6, ge=1, description="Accuracies in a row without a new best before stopping (ours).")
    max_pairs: int = pydantic.Field(0, ge=0, description="Training pairs at most, of all rounds, drawn at random; 0 takes all (ours).")
    max_validation_pairs: int = pydantic.Field(0, ge=0, description="Validation pairs at most, drawn at random; 0 takes all (ours).")
    second_share: float = pydantic.Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training source images whose pairs go to a second judge alone, which watches the policy; "
        "without one, where no target is known, only seams, lettering and remainders can show that its judge is hacked (ours).",
    )
    paste_source: bool = pydantic.Field(True, description="Show candidates pasted into the source image outside the mask (ours).")
    start: str = pydantic.Field(
        "base",
        description="Release on which the round goes on, named by a stage such as `production` or by its digest: the base judge is fitted "
        "to the labels behind it too; `base` in a first round (ours).",
    )
    dtype: Literal["float32", "bfloat16"] = pydantic.Field(
        "float32", description="Type of the weights (ours); bfloat16 is meant for LoRA: full training at 1e-6 is lost in its rounding."
    )
    gradient_checkpointing: bool = pydantic.Field(False, description="Trade time for memory; for full-size judges (ours).")
    seed: int = pydantic.Field(0, ge=0, description="Seed of the order of pairs and of LoRA's initial weights (ours).")


def fit_reward(
    config: FitRewardConfig,
    base_judge: Path,
    curated: Path,
    candidates: Path,
    pairs: Path,
    out: Path,
    progress: Progress,
    taxonomy: Taxonomy | None = None,
    judge_class: type[Judge] = Judge,
    earlier: Sequence[Round] = (),
) -> dict[str, Any]:
    """Fit a judge into `out`, an empty folder.

    Args:
        base_judge: folder of a Qwen2.5-VL, from which both judges start; what is said of the "base" is said of it.
        curated, candidates, pairs: artifacts of those stages.
        earlier: the same of rounds before, whose training pairs are fitted to as well, but for those of images that are validated or
            tested on now and of cells that the taxonomy has no more.
        taxonomy: tasks, dimensions and the query; the shipped one if None.
        judge_class: how two images are compared; `Judge` reads both at once.

    Returns:
        what metrics.json holds: mean_accuracy, base_mean_accuracy, order_consistency, cells, steps, best_step, ... on the validation split.

    Raises:
        MissingWeights, BrokenWeights: the base judge cannot be read, or its answers are not finite.
        NotEnoughData: no training or no validation pairs.
        BadManifest, BadImage, UnknownVersion: the three artifacts do not belong together.
    """
    taxonomy = taxonomy or Taxonomy.load()
    images = PairImages(curated, candidates, config.paste_source)
    validation = _at_most(_split(pairs, "validation"), config.max_validation_pairs, config.seed)
    train = [(images, pair) for pair in _split(pairs, "train")]
    origins = origins_of(curated, [pair for _, pair in train])  # fails early when artifacts do not belong together
    for each in earlier:
        for shown, origin in _earlier(each, curated, taxonomy, config.paste_source):
            train.append(shown)
            origins.append(origin)
    chosen = _at_most(list(zip(train, origins, strict=True)), config.max_pairs, config.seed)
    first, second = _shares(chosen, config.second_share)

    def fitted(share: Sequence[Shown], place: Path, seed: int, label: str) -> _Fit:
        """A judge fitted to `share` and saved, with the record of its fitting."""
        judge = judge_class.load(base_judge, taxonomy, getattr(torch, config.dtype))
        judge.model.to(default_device())
        if config.gradient_checkpointing:
            judge.model.activation_checkpointing_enable()
        fit = _Fit(config.model_copy(update={"seed": seed}), judge, taxonomy, images, validation, progress, label)
        fit.run(share)
        fit.save(place)
        return fit

    # the second one's weights are gone before the first is loaded: at full size both would not fit
    label = "fit_reward, second judge"
    told = _second_report(fitted(second, out / SECOND, config.seed + 1, label), len(second)) if second else None
    fit = fitted(first, out, config.seed, "fit_reward")
    metrics, figures = _report(fit, len(first), origins_of(curated, validation))
    metrics["pairs_earlier"] = sum(shown is not images for shown, _ in first)
    metrics["second"] = told
    _write_lines(out / "curve.jsonl", fit.curve)
    _write_lines(out / "accuracy.jsonl", figures)
    _draw(out, metrics, fit.curve)
    write_metrics(out, metrics)
    return metrics


def _second_report(fit: _Fit, pairs_train: int) -> dict[str, Any]:
    """What metrics.json says of the judge that watches."""
    right = mean_over_cells(fit.validation, decisions(*fit.best_odds)[0])
    return {"mean_accuracy": right, "pairs_train": pairs_train, "best_step": fit.best_step}


def _split(pairs: Path, split: str) -> list[Pair]:
    """The pairs of a split. Raises NotEnoughData where there are none."""
    found = [pair for pair in read_rows(pairs / "pairs.jsonl", Pair) if pair.split == split]
    if not found:
        raise NotEnoughData(f"There are no {split} pairs.", "Label more conditions, or lower the share of ties.")
    return found


def _earlier(artifacts: Round, curated: Path, taxonomy: Taxonomy, pasted: bool) -> list[tuple[Shown, str]]:
    """The training pairs of an earlier round and their origins, without those that `curated` holds out and of other cells than now."""
    before, candidates, pairs = artifacts
    held_out = {row.origin for row in read_rows(curated / "conditions.jsonl", Condition) if row.split != "train"}
    images, train = PairImages(before, candidates, pasted), _split(pairs, "train")
    train = [pair for pair in train if (pair.task, pair.dimension) in taxonomy.cells]
    return [((images, pair), origin) for pair, origin in zip(train, origins_of(before, train), strict=True) if origin not in held_out]


def _shares(train: Sequence[tuple[Shown, str]], share: float) -> tuple[list[Shown], list[Shown]]:
    """The pairs of the judge and those of the second: whole origins, photographs and scenes, by a hash of their names.

    Raises NotEnoughData where one of the two would have none.
    """
    first: list[Shown] = []
    second: list[Shown] = []
    for shown, origin in train:
        is_second = int(hashlib.sha256(origin.encode()).hexdigest()[:8], 16) < share * 2**32
        (second if is_second else first).append(shown)
    if not first or (share and not second):
        raise NotEnoughData(
            f"{len(train)} training pairs do not share out over two judges.", "Label more images, or set second_share to 0."
        )
    return first, second


def _at_most(rows: list[Item], most: int, seed: int) -> list[Item]:
    """At most so many rows, drawn at random and in their order; all where `most` is 0."""
    if most and most < len(rows):
        kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
        rows = [rows[i] for i in sorted(kept.tolist())]
    return rows


def _batches(rows: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Endless batches: every row once per pass, each pass in a new order, batches running on across passes."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        batch, queue = queue[:size], queue[size:]
        yield [rows[i] for i in batch]


class _Fit:
    """The training loop and its state: log-odds on the validation pairs of the untouched judge (`base_odds`) and of what is kept."""

    def __init__(
        self,
        config: FitRewardConfig,
        judge: Judge,
        taxonomy: Taxonomy,
        images: PairImages,
        validation: Sequence[Pair],
        progress: Progress,
        label: str,
    ):
        self.config, self.judge, self.taxonomy, self.images = config, judge, taxonomy, images
        self.validation, self.progress, self.label = validation, progress, label
        self.curve: list[dict[str, Any]] = []
        self.best = (-1.0, 0.0)  # accuracy, then minus loss: on few pairs ties in accuracy are frequent
        self.best_step = self.step = 0
        self.adapted: peft.PeftModel | None = None
        if config.lora_rank:
            torch.manual_seed(config.seed)
            lora = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear")
            adapted = peft.get_peft_model(judge.model, lora)  # injects the layers into judge.model itself
            assert isinstance(adapted, peft.PeftModel)
            self.adapted = adapted
        self.weights = {name: weight for name, weight in judge.model.named_parameters() if weight.requires_grad}
        self.kept: dict[str, Tensor] = {}
        self.base_odds = self.best_odds = self._evaluate(None)
        if not self.kept:
            raise BrokenWeights("The base judge's answers are not finite.", "Fetch or train its weights again, or use float32.")

    def run(self, train: Sequence[Shown]) -> None:
        """Train until `steps`, or until the accuracy has not risen for `patience` evaluations; leaves the best weights in the judge."""
        config, warmup = self.config, self.config.warmup_steps
        optimizer = torch.optim.AdamW(self.weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (warmup + 1), (config.steps - step) / max(1, config.steps - warmup))
        )
        batches = _batches(train, config.batch_size, config.seed)
        losses: list[float] = []  # since the last evaluation
        stale = 0  # evaluations since the best
        self.judge.model.train()
        with self.progress.bar(self.label, total=config.steps, unit="step") as bar:
            while self.step < config.steps and stale < config.patience:
                losses.append(self._gradient(next(batches)))
                torch.nn.utils.clip_grad_norm_(self.weights.values(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self.step += 1
                if self.step == config.steps or self.step % config.eval_every == 0:
                    self._evaluate(sum(losses) / len(losses))
                    losses = []
                    stale = 0 if self.best_step == self.step else stale + 1
                bar.advance(validation_loss=self.curve[-1]["validation_loss"], best_accuracy=self.best[0])
        for name, weight in self.weights.items():
            weight.data.copy_(self.kept[name])
        self.judge.model.eval()

    def _gradient(self, batch: Sequence[Shown]) -> float:
        """Add up the gradient of the mean loss over the batch; returns that loss."""
        size = self.config.micro_batch or len(batch)
        total = 0.0
        for images in dict.fromkeys(images for images, _ in batch):  # one round after the other
            pairs = [pair for place, pair in batch if place is images]
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                loss = pair_loss(*both_orders(self.judge, self.taxonomy, images, part)) * (len(part) / len(batch))
                loss.backward()
                total += loss.item()
        return total

    def _evaluate(self, loss: float | None) -> tuple[Tensor, Tensor]:
        """Add a point to the curve; keep weights and log-odds when they are the best so far."""
        odds = self._ask()
        accuracy, held_out = mean_over_cells(self.validation, decisions(*odds)[0]), pair_loss(*odds).item()
        self.curve.append({"step": self.step, "loss": loss, "validation_loss": held_out, "accuracy": accuracy})
        if math.isfinite(held_out) and (accuracy, -held_out) > self.best:  # an answer of nan would count as undecided, half right
            self.best, self.best_step, self.best_odds = (accuracy, -held_out), self.step, odds
            self.kept = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        return odds

    def _ask(self) -> tuple[Tensor, Tensor]:
        """Log-odds of the judge as it is now on the validation pairs, in both orders."""
        size = self.config.micro_batch or self.config.batch_size
        label = f"{self.label}: validation at step {self.step}"
        return ask(self.judge, self.taxonomy, self.images, self.validation, batch_size=size, progress=self.progress, label=label)

    def save(self, out: Path) -> None:
        """Write adapter/ when LoRA, then model/ with the adapter merged in; what is reported of a merged model is asked of it anew."""
        if self.adapted is not None:
            # the base's path on this machine must be neither in the artifact nor in its digest
            self.adapted.peft_config["default"].base_model_name_or_path = ""
            self.adapted.save_pretrained(str(out / "adapter"))
            (out / "adapter" / "README.md").unlink(missing_ok=True)  # peft's template of a model card, never filled in
            self.adapted.merge_and_unload()
            self.best_odds = self._ask()  # bfloat16 rounds the merged weights: another judge than the one that was trained
        self.judge.save(out / "model")


def _report(fit: _Fit, pairs_train: int, origins: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.json and the rows of accuracy.jsonl."""
    pairs, taxonomy = fit.validation, fit.taxonomy
    found = summarise(taxonomy, pairs, origins, *fit.best_odds)
    base_right, base_consistent = decisions(*fit.base_odds)
    base_cells = cell_means(pairs, base_right)
    for cell in found["cells"]:
        cell["base_accuracy"] = base_cells[cell["task"], cell["dimension"]]
    metrics = {
        **found,
        "base_mean_accuracy": mean_over_cells(pairs, base_right),
        "base_order_consistency": mean_over_cells(pairs, base_consistent),
        "loss": pair_loss(*fit.best_odds).item(),
        "base_loss": pair_loss(*fit.base_odds).item(),
        "split": pairs[0].split,
        "paste_source": fit.config.paste_source,  # whoever asks this judge later must show it pictures made the same way
        "steps": fit.step,
        "best_step": fit.best_step,
        "pairs_train": pairs_train,
        "pairs_validation": len(pairs),
        "query_version": taxonomy.query_template.version,
    }
    fitted, base = (pair_rows(pairs, origins, *odds) for odds in (fit.best_odds, fit.base_odds))
    orders = ("p_winner_first", "p_loser_first")
    rows = [{**row, **{f"base_{key}": before[key] for key in orders}} for row, before in zip(fitted, base, strict=True)]
    return metrics, rows


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _draw(out: Path, metrics: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
    cells = metrics["cells"]
    labels = [f"{cell['task']} · {cell['dimension'].replace('_', ' ')} (n={cell['n']})" for cell in cells]
    fitted = [(cell["accuracy"], cell["lo"], cell["hi"]) for cell in cells]
    base = [(cell["base_accuracy"],) * 3 for cell in cells]
    save_picture(out, "accuracy", rates(labels, {"base": base, "fitted": fitted}, x="agreement with the annotators, validation pairs"))
    steps = [point["step"] for point in curve]
    shown = {
        "accuracy (validation)": (steps, [point["accuracy"] for point in curve]),
        "loss (validation)": (steps, [point["validation_loss"] for point in curve]),
        "loss (training, mean since the point before)": (steps[1:], [point["loss"] for point in curve[1:]]),
    }
    save_picture(out, "curve", curves(shown, x="step", y=""))
