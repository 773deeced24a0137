"""Everything measured on the edits of an evaluation, as records: by the family of measures that its evidence names.

    items = measured(jobs, digests, judge_digest, kept, opinions, edits, shards, taxonomy, progress, evidence="blind", clip=clip)

`ground_truth` compares with the known target, which only procedural scenes have; `blind` looks at no target, and measures every picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor

from infra.progress import Progress
from models.blind import WITH_CLIP, Edit, blind
from models.clip import Clip
from models.errors import ConfigError
from models.images import to_tensor
from models.mini.acceptance import accept
from models.mini.measures import measure
from models.mini.seen import seen
from models.records import Condition
from models.shards import ShardReader
from models.taxonomy import Taxonomy
from ops.policy_health import preservation
from ops.win_rates import SCENE, Item

Evidence = Literal["ground_truth", "blind"]
Opinions = Mapping[str, dict[str, dict[str, list[float]]]]  # edit key -> opponent -> dimension -> P(Yes) in both orders


@dataclass(frozen=True)
class Job:
    """One condition with one seed: what every contestant edits."""

    condition: Condition
    seed: int
    image: Tensor  # [3, H, W]
    mask: Tensor  # [1, H, W]

    def key(self, policy: str) -> str:
        return f"{self.condition.id}.{self.seed}.{policy}"


class Kept(NamedTuple):
    """What the raw edit left of its source outside the mask: PSNR in dB, and likeness to the eye (models/blind.py), up to 1."""

    psnr: float
    similarity: float


def require_clip(jobs: Iterable[Job], taxonomy: Taxonomy) -> None:
    """Raises ConfigError where blind evidence on these jobs takes a CLIP checkpoint: called only where there is none."""
    names = {name for job in jobs for name in taxonomy.task(job.condition.task).dimensions}
    asked = {measure for d in map(taxonomy.dimension, names) for measure in (d.measured_by, d.confirmed_by)}
    if needed := sorted(asked & WITH_CLIP):
        raise ConfigError(
            f"Blind evidence on these tasks needs a CLIP checkpoint, for {', '.join(needed)}.",
            "Name a folder or a hub id in the preset, as `models: {clip: hub:openai/clip-vit-large-patch14}`.",
        )


def measured(
    jobs: list[Job],
    digests: Mapping[str, str],
    judge_digest: str,
    kept: Mapping[str, Kept],
    opinions: Opinions,
    edits: ShardReader,
    shards: ShardReader,
    taxonomy: Taxonomy,
    progress: Progress,
    *,
    evidence: Evidence,
    clip: Clip | None,
) -> list[Item]:
    """One record per edit. The measures take time here: some read the lettering with an OCR network."""
    edited = [(job, name) for job in jobs for name in digests if job.key(name) in edits]
    items = []
    with progress.bar("evaluation: measures", len(edited), "image") as bar:
        for job, name in edited:
            key = job.key(name)
            first, second = _blind(job, edits[key], taxonomy, clip) if evidence == "blind" else _true(job, edits[key], shards, taxonomy)
            items.append(
                Item(
                    split=job.condition.split,
                    condition_id=job.condition.id,
                    source_id=job.condition.source_id,
                    origin=job.condition.origin,
                    task=job.condition.task,
                    kind=job.condition.kind,
                    prompt=job.condition.prompt,
                    seed=job.seed,
                    policy=name,
                    policy_digest=digests[name],
                    judge_digest=judge_digest,
                    measures=first,
                    confirming_measures=second,
                    judge=opinions.get(key, {}),
                    preservation_psnr=kept[key].psnr,
                    outside_similarity=kept[key].similarity,
                    withheld_psnr=_withheld(job, edits[key], shards),
                    seen=_seen(job, edits[key], taxonomy),
                )
            )
            bar.advance()
    return items


def _withheld(job: Job, edit: Image.Image, shards: ShardReader) -> float | None:
    """PSNR in dB inside the mask against the withheld pixels of the source; None for scenes, and for tasks they do not answer."""
    key = f"{job.condition.id}.target"
    if job.condition.kind == SCENE or key not in shards:
        return None
    return preservation(to_tensor(edit), to_tensor(shards[key]), 1 - job.mask)


def _seen(job: Job, edit: Image.Image, taxonomy: Taxonomy) -> dict[str, bool]:
    """What the request asks for and is to be seen (models/mini/seen.py); empty for photographs, of which no facts are known."""
    condition = job.condition
    if condition.kind != SCENE:
        return {}
    return seen(to_tensor(edit), job.mask, condition.truth, condition.prompt, taxonomy.task(condition.task).condition)


def _true(job: Job, edit: Image.Image, shards: ShardReader, taxonomy: Taxonomy) -> tuple[dict[str, float], dict[str, float]]:
    """Dimension -> the acceptance measure, which counts wins, and -> the annotator's, which has to confirm them.

    Both are empty where the perfect edit is not known.
    """
    key = f"{job.condition.id}.target"
    if job.condition.kind != SCENE or key not in shards:
        return {}, {}
    dimensions = [taxonomy.dimension(name) for name in taxonomy.task(job.condition.task).dimensions]
    known = to_tensor(edit), to_tensor(shards[key]), job.mask, job.condition.truth, job.condition.prompt
    return (
        {each.name: accept(each.accepted_by, *known) for each in dimensions},
        {each.name: measure(each.labelled_by, *known) for each in dimensions},
    )


def _blind(job: Job, edit: Image.Image, taxonomy: Taxonomy, clip: Clip | None) -> tuple[dict[str, float], dict[str, float]]:
    """Dimension -> the measure that counts wins, and -> the one that has to confirm them. Neither needs a target."""
    dimensions = [taxonomy.dimension(name) for name in taxonomy.task(job.condition.task).dimensions]
    asked = Edit(to_tensor(edit), job.image, job.mask, job.condition.prompt)
    return (
        {each.name: blind(each.measured_by, asked, clip) for each in dimensions},
        {each.name: blind(each.confirmed_by, asked, clip) for each in dimensions},
    )
