"""The model card of a release: what it is, what was measured, what was not, and everything it was made from.

    text = render_card(Card(...))

Every figure is passed in; nothing is worded here that a measurement did not say. The template lies beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


@dataclass(frozen=True)
class Card:
    """What a card tells."""

    title: str
    mode: str  # reference mode of the policy
    dtype: str
    base_model: str  # hub id of the base, or "" where it has none
    licence: str  # of the base, as its own card names it, or "" where it names none
    split: str
    counted: str  # what wins are counted by, in words
    sampling: Mapping[str, Any]  # how the measured edits were sampled: steps, true_cfg, guidance_scale, negative_prompt
    summary: Mapping[str, Any]  # the mode's entry under `policy` in an evaluation's metrics
    gates: Sequence[Mapping[str, Any]]  # {name, measure, threshold, passed}
    lineage: Sequence[Mapping[str, Any]]  # {name, digest}
    onnx: Mapping[str, Any]  # metrics of the `onnx` artifact
    engine: Mapping[str, Any]  # metrics of the `engine` artifact
    not_verified: Sequence[str]  # one sentence each


def render_card(card: Card) -> str:
    """The card as Markdown with the hub's front matter."""
    data = ModelCardData(
        base_model=card.base_model or None,
        license=card.licence or "unknown",
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["inpainting", "flux", "onereward"],
    )
    if card.licence:
        note = f"The weights derive from the base and stay under its licence, `{card.licence}`; read it before any use."
    else:
        note = "The weights derive from the base and stay under its licence. The base names none: ask its owner before any use."
    words: dict[str, Any] = {"rate": _rate, "figure": _figure, "repr": repr, "licence_note": note}
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **words, **vars(card)))


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.4g}"
