"""Load FLUX Fill from a folder or hub id, and a policy's transformer on top of it.

    pipe = load_pipeline("black-forest-labs/FLUX.1-Fill-dev", torch.bfloat16)
    transformer = load_transformer("black-forest-labs/FLUX.1-Fill-dev", policy=Path("policy"), dtype=torch.bfloat16)

The libraries fill weights that a file lacks with random numbers and a warning; here a file that is absent is
MissingWeights, one that is cut, altered, of another architecture or not finite is BrokenWeights, and both name the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_FILE
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, T5EncoderModel

from models.errors import BrokenWeights, MissingWeights
from models.flux_fill.pipeline import FluxFillCFGPipeline

NETWORKS: dict[str, Any] = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
FILES = {  # any one of them must be there: transformers makes an empty tokenizer of an empty folder
    "scheduler": ["scheduler_config.json"],
    "tokenizer": ["tokenizer.json", "vocab.json"],
    "tokenizer_2": ["tokenizer.json", "spiece.model"],
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
AGAIN = "Download or make it again."


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> FluxFillCFGPipeline:
    """The whole pipeline, in evaluation mode, on the CPU. `path` is a folder in diffusers' layout, or a hub id.

    Raises:
        MissingWeights: the folder, a component or one of its files is absent.
        BrokenWeights: a weights file cannot be used.
    """
    folder = _folder(path, [*NETWORKS, *FILES])
    if not (folder / "model_index.json").exists():
        raise MissingWeights(f"{folder / 'model_index.json'} is not there.", AGAIN)
    for name, files in FILES.items():
        if not any((folder / name / file).exists() for file in files):
            raise MissingWeights(f"{folder / name / files[0]} is not there.", AGAIN)
    networks = {name: load_network(kind, folder / name, dtype) for name, kind in NETWORKS.items()}
    try:
        return FluxFillCFGPipeline.from_pretrained(folder, dtype=dtype, **networks)
    except (OSError, ValueError) as error:
        raise BrokenWeights(f"The tokenizers and the scheduler of {folder} do not load: {error}.", AGAIN) from error


def load_transformer(path: str | Path, policy: Path | None = None, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """The transformer of the base at `path`, or of a policy trained from it, in evaluation mode, on the CPU.

    `policy` holds `transformer/` (taken instead of the base's) or `adapter/` (a peft LoRA, merged into the base's).

    Raises:
        MissingWeights, BrokenWeights: as `load_pipeline`, for the base as for the policy.
    """
    if policy is not None and (policy / "transformer").is_dir():
        return load_network(FluxTransformer2DModel, policy / "transformer", dtype)
    transformer = load_network(FluxTransformer2DModel, _folder(path, ["transformer"]) / "transformer", dtype)
    if policy is None:
        return transformer
    if not (policy / "adapter").is_dir():
        raise MissingWeights(f"{policy} holds neither transformer/ nor adapter/.", "Name the folder of a trained policy.")
    return _merge(transformer, policy / "adapter")


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One network of class `kind` (diffusers' or transformers') with every weight from `folder`, in evaluation mode, on the CPU.

    Raises:
        MissingWeights, BrokenWeights: as `load_pipeline`.
    """
    if not (folder / "config.json").exists():
        raise MissingWeights(f"{folder / 'config.json'} is not there.", AGAIN)
    files = _files(folder)
    for file in files:
        _check_file(file)
    try:
        network, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BrokenWeights(f"{_names(files)} cannot be loaded as {kind.__name__}: {error}.", AGAIN) from error
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if issubclass(kind, ModelMixin):  # text encoders are often saved with the parts that FLUX does not use
        wrong += found["unexpected_keys"]
    if wrong:
        raise BrokenWeights(f"{_names(files)} and its config.json disagree about {len(wrong)} weights, such as {wrong[0]}.", AGAIN)
    _check_finite(network, _names(files))
    return network.eval()


def _folder(path: str | Path, components: list[str]) -> Path:
    """The local folder of `path`, fetched from the hub (only these components) if it is a hub id and no folder."""
    if Path(path).is_dir():
        return Path(path)
    if not HUB_ID.fullmatch(str(path)):
        raise MissingWeights(f"The weights folder {path} is not there.", "Name an existing folder or a hub id such as owner/name.")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["model_index.json", *(f"{name}/*" for name in components)]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingWeights(
            f"{path} is no folder here and cannot be fetched from the hub: {error}.",
            "Name an existing folder, connect to the network, or accept the model's licence and log in.",
        ) from error


def _files(folder: Path) -> list[Path]:
    """The safetensors files of one component, all of them there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if escaping := [name for name in names if Path(name).name != name]:
                raise BrokenWeights(f"{index} names {escaping[0]!r}, which is not beside it.", AGAIN)
            files = [folder / name for name in names]
        except (ValueError, KeyError) as error:
            raise BrokenWeights(f"{index} is no index of weights.", AGAIN) from error
        break
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file for file in files if not file.exists()]
    if not files:
        raise MissingWeights(f"{folder / '*.safetensors'} is not there.", "Name a checkpoint with safetensors; pickles are not read.")
    if missing:
        raise MissingWeights(f"{missing[0]} is not there.", AGAIN)
    return files


def _check_file(file: Path) -> None:
    """The header is whole and the file is as long as the header says."""
    try:
        with safe_open(file, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise BrokenWeights(f"{file} is cut or altered: {error}.", AGAIN) from error


def _check_finite(network: torch.nn.Module, name: str) -> None:
    for key, value in network.named_parameters():
        if not torch.isfinite(value).all():
            raise BrokenWeights(f"{name} holds values that are not finite in {key}.", AGAIN)


def _names(files: list[Path]) -> str:
    return ", ".join(str(file) for file in files)


def _merge(transformer: FluxTransformer2DModel, folder: Path) -> FluxTransformer2DModel:
    """`transformer` with the LoRA in `folder` added to its weights, plain again."""
    file = folder / ADAPTER_FILE
    for needed in (folder / "adapter_config.json", file):
        if not needed.exists():
            raise MissingWeights(f"{needed} is not there.", AGAIN)
    _check_file(file)
    with safe_open(file, framework="pt") as weights:
        keys = set(weights.keys())
    try:
        adapted = PeftModel.from_pretrained(transformer, str(folder), config=PeftConfig.from_pretrained(str(folder)))
    except (ValueError, TypeError, RuntimeError) as error:
        raise BrokenWeights(f"{file} does not fit the base's transformer: {error}.", "Use the base it was trained from.") from error
    wrong = sorted(keys ^ set(get_peft_model_state_dict(adapted)))
    if wrong:
        raise BrokenWeights(f"{file} and adapter_config.json disagree about {len(wrong)} weights, such as {wrong[0]}.", AGAIN)
    merged = adapted.merge_and_unload()
    _check_finite(merged, str(file))
    return merged.eval()


def forget_origin(folder: Path) -> None:
    """Drop what names the machine's paths from a folder that diffusers or peft wrote: equal weights, equal bytes, equal digest."""
    for file in folder.rglob("*config.json"):
        values = json.loads(file.read_text())
        values.pop("_name_or_path", None)
        if "base_model_name_or_path" in values:
            values["base_model_name_or_path"] = None
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
