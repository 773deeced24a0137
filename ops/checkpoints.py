"""Checkpoints of a policy run: everything needed to go on as if nothing had happened, in safetensors.

    save(folder, step, sets={"policy": ..., "average": ...}, optimizer=optimizer, record={"curve": rows})
    step, sets, record = load_newest(folder, optimizer)

A checkpoint is written beside its place and moved there whole, so that a run killed while writing resumes from the one before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer


def save(folder: Path, step: int, *, sets: dict[str, dict[str, Tensor]], optimizer: Optimizer, record: dict[str, Any]) -> Path:
    """Write `folder/step-<step>` and drop older ones. `sets` are named groups of tensors, `record` what has been seen so far."""
    place, draft = folder / f"step-{step:06d}", folder / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, tensors in sets.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, draft / f"{name}.safetensors")
    moments = {f"{index}.{key}": value for index, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    save_file({key: value.cpu().contiguous() for key, value in moments.items()}, draft / "optimizer.safetensors")
    (draft / "record.json").write_text(json.dumps(record))
    draft.replace(place)
    for older in folder.glob("step-*"):
        if older != place:
            shutil.rmtree(older)
    return place


def load_newest(folder: Path, optimizer: Optimizer) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The step, tensor groups and record of the newest checkpoint, with `optimizer` set to it; None where there is none."""
    places = sorted(folder.glob("step-*"))
    if not places:
        return None
    place = places[-1]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(place / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    sets = {path.stem: load_file(path) for path in place.glob("*.safetensors") if path.stem != "optimizer"}
    return int(place.name.removeprefix("step-")), sets, json.loads((place / "record.json").read_text())
