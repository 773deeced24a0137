"""Lettering as an OCR network reads it: RapidOCR, whose detection and recognition networks lie in its wheel.

read(picture, find=False)       # the picture is one line of text
read(picture, find=True)        # lines anywhere in it
words_asked('the word "open"')  # "open"
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LINE_PX = 48  # height that the recognition network was trained on
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class Line(NamedTuple):
    """One line of text and the network's confidence in it, 0 to 1."""

    text: str
    confidence: float


@lru_cache(maxsize=1)
def engine() -> Any:
    """RapidOCR itself, loaded once."""
    from rapidocr import RapidOCR  # loads networks: only where lettering is read

    return RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()})


def read(picture: Tensor, *, find: bool) -> list[Line]:
    """The lines in a picture [3, H, W] in [0, 1]; smaller ones are enlarged to `LINE_PX`. `find` looks for them, else it is one line."""
    height, width = picture.shape[-2:]
    scale = max(1.0, LINE_PX / height)
    size = (round(height * scale), round(width * scale))
    large = F.interpolate(picture[None].clamp(0, 1), size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    pixels = (large.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[:, :, ::-1]  # the networks take BGR
    found = engine()(pixels, use_det=find, use_cls=False, use_rec=True)
    return [Line(text, float(score)) for text, score in zip(found.txts or (), found.scores or (), strict=True)]


def words_asked(prompt: str) -> str:
    """What the prompt puts in double quotes, joined by spaces; "" where it quotes nothing."""
    return " ".join(straight or curly for straight, curly in QUOTED.findall(prompt))


def likeness(lines: list[Line], asked: str) -> float:
    """How much of `asked` was read, 0 to 1: similarity (Ratcliff-Obershelp, case ignored) times confidence, of the nearest line or of
    all together. Where nothing particular is asked for: the confidence of what is there."""
    if not lines:
        return 0.0
    whole = Line(" ".join(line.text for line in lines), sum(line.confidence for line in lines) / len(lines))
    if not asked:
        return whole.confidence
    return max(c * difflib.SequenceMatcher(None, text.casefold(), asked.casefold()).ratio() for text, c in (*lines, whole))
