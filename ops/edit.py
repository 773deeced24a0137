"""One edit with a released policy or the base: image, mask and prompt in, picture out.

    edit(EditConfig(), Path("data/mini/flux-fill"), Path("photo.png"), Path("mask.png"), prompt="a red circle")

Settings default to the authors' demos; `onereward edit` takes those that a release was measured with, for the base and a policy those of
the preset's evaluation. Outside the mask the source's own pixels are kept.
"""

from __future__ import annotations

from pathlib import Path

import pydantic
import torch
from PIL import Image

from models.device import default_device
from models.errors import ConfigError
from models.flux_fill.config import SamplingConfig
from models.flux_fill.loading import load_pipeline, load_transformer
from models.images import paste, to_mask, to_pil, to_tensor
from models.masks import check_mask
from models.taxonomy import Taxonomy
from ops.source import GRID, read_image


class EditConfig(SamplingConfig):
    """How the edit is sampled."""

    seed: int = pydantic.Field(0, description="Seed of the noise; 0 in the authors' demos.")


def edit(
    config: EditConfig,
    base: Path,
    image: Path,
    mask: Path,
    *,
    policy: Path | None = None,
    prompt: str | None = None,
    task: str | None = None,
    taxonomy: Taxonomy | None = None,
) -> Image.Image:
    """The edited picture, of the source's size.

    Args:
        base: pipeline folder; policy: a policy artifact whose transformer is used instead of the base's.
        mask: white where pixels are to be made. prompt: what to make there; a task with a fixed prompt needs none.

    Raises BadImage, BadMask, UnknownTask, ConfigError (neither a prompt nor a task that has one), MissingWeights, BrokenWeights.
    """
    if task is not None:
        fixed = (taxonomy or Taxonomy.load()).task(task).fixed_prompt
        prompt = fixed if prompt is None else prompt
    if prompt is None:
        raise ConfigError("There is no prompt.", "Give --prompt, or a --task that has a fixed one.")
    source = read_image(image, image.name).convert("RGB")
    drawn = check_mask(read_image(mask, mask.name), source.size, image.name)
    width, height = (-(-side // GRID) * GRID for side in source.size)
    pipe = load_pipeline(base)
    if policy is not None:
        pipe.transformer = load_transformer(base, policy)
    pipe.to(default_device())
    made = pipe(
        prompt=prompt,
        image=source,
        mask_image=drawn,
        height=height,
        width=width,
        num_inference_steps=config.steps,
        true_cfg=config.true_cfg,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        generator=torch.Generator().manual_seed(config.seed),
        return_dict=False,
    )[0][0]
    return to_pil(paste(to_tensor(source), to_tensor(made.resize(source.size)), to_mask(drawn)))


def check_picture_name(path: Path) -> None:
    """Raises ConfigError for a file name whose ending names no format that Pillow writes."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"{path.name!r} does not say in which format to write the picture.", "Name it .png, .jpg or .webp.")
