"""One editing request from one picture: what the task's taxonomy entry asks for, as image, mask, prompt and target.

    made = make_condition(task, scene.image, clean=scene.clean, object_mask=scene.object_mask, words_mask=scene.words_mask,
                          caption=scene.caption, words=scene.words, truth=scene.truth, rng=rng)

Curation and the pre-training of the mini base both call it, so that the base has met every kind of request it is judged on.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from models.masks import make_mask
from models.taxonomy import MaskKind, Task


class Made(NamedTuple):
    """An editing request: `image` (RGB), `mask` (L, 255 where pixels are to be made), `prompt`, and what a perfect edit looks like."""

    image: Image.Image
    mask: Image.Image
    prompt: str
    target: Image.Image | None
    mask_kind: MaskKind | Literal["given"]  # `given`: the user's own


def make_condition(
    task: Task,
    image: Image.Image,
    *,
    clean: Image.Image | None = None,
    object_mask: Image.Image | None = None,
    words_mask: Image.Image | None = None,
    caption: str = "",
    words: str = "",
    truth: dict[str, Any] | None = None,
    rng: np.random.Generator,
    mask: Image.Image | None = None,
    verbatim: bool = False,
) -> Made | None:
    """The request of `task` on `image`, or None where the picture cannot serve it (no words, no object, no caption).

    `object_mask` and `words_mask` (L, 255 on the thing) say where the task's subject is. `mask` is the user's own mask for
    exactly this task: it is taken as it is, and what it covers is then no answer to the prompt, so there is no target.
    `verbatim` takes the caption as the prompt even where the task asks for words. `truth["object"]["caption"]`, where given,
    describes the object alone and goes before the caption for a task on the object.
    """
    prompt = _prompt(task, caption, words, truth or {}, verbatim)
    if prompt is None:
        return None
    if mask is not None:
        return Made(image, mask, prompt, clean if task.condition == "clean" else None, "given")
    region = {"object": object_mask, "word": words_mask, "scene": None, "clean": object_mask, "background": object_mask}[task.condition]
    if region is None and task.condition in ("word", "clean", "background"):
        return None  # nothing to write, to take away, or to keep
    kind = task.mask[rng.integers(len(task.mask))]
    drawn = make_mask(kind, image.size, region=region, rng=rng)
    return Made(image, drawn, prompt, clean if task.condition == "clean" else image, kind) if drawn else None


def _prompt(task: Task, caption: str, words: str, truth: dict[str, Any], verbatim: bool) -> str | None:
    if task.prompt == "fixed":
        return task.fixed_prompt
    if task.prompt == "words" and not verbatim:
        return f'the word "{words}"' if words else None
    if task.condition == "object":
        caption = truth.get("object", {}).get("caption", caption)
    return caption or None
