"""How a finished edit is sampled, wherever one is: in the evaluation, by `onereward edit`, on a release's card."""

from __future__ import annotations

from typing import Any

import pydantic

from models.config import OpConfig


class SamplingConfig(OpConfig):
    """Everything but the noise; the authors' demos where a preset says nothing."""

    steps: int = pydantic.Field(50, ge=1, description="Inference steps; 50 in the authors' demos.")
    true_cfg: float = pydantic.Field(4.0, ge=1, description="CFG scale; 4.0 in the authors' demos, 1 switches it off.")
    guidance_scale: float = pydantic.Field(1.0, ge=0, description="Distilled guidance; 1.0 in the authors' demos.")
    negative_prompt: str = pydantic.Field("nsfw", description="Negative prompt; the authors' demos use this one.")

    def sampling(self) -> dict[str, Any]:
        """These fields alone, of whatever configuration holds them."""
        return self.model_dump(include=set(SamplingConfig.model_fields))
