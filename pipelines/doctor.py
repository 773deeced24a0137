"""`onereward doctor`: what this machine offers the chain, and for every shortcoming its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import urllib3

from assets.settings import Settings, resolve
from assets.sources import ROOT
from infra.data import HUB
from infra.stores.lakefs_access import ENDPOINT, Access
from infra.stores.lakefs_server import MAIN, open_server
from infra.workspace import Workspace
from models.errors import OneRewardError

Level = Literal["ok", "warning", "error"]
MEMORY_GB = 6.0  # the mini preset's limit
DISK_GB = 5.0  # a run of the mini preset with its versions, several times over
LAKEFS = "lakefs://"
UNUSED = "onereward"  # a name to ask a server with that is not the store
ANTLR_REMEDY = "pip install --no-deps antlr4-python3-runtime==4.13.2   (DVC then cannot compose Hydra configs; nothing here does)"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is empty when the level is ok."""

    name: str
    level: Level
    found: str
    remedy: str = ""


def _cores(settings: Settings) -> Finding:
    cores = os.cpu_count() or 1
    if settings.threads > cores:
        return Finding(
            "cores", "warning", f"{cores}, the preset wants {settings.threads} threads", f"Set `threads: {cores}` in the preset."
        )
    return Finding("cores", "ok", f"{cores}, {settings.threads} threads used")


def _memory() -> Finding:
    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY_GB:
        return Finding(
            "memory",
            "warning",
            f"{free:.1f} GB free, {MEMORY_GB:.0f} wanted",
            "Close other programs, or lower the batch sizes in the preset.",
        )
    return Finding("memory", "ok", f"{free:.1f} GB free")


def _disk(workspace: Workspace) -> Finding:
    folder = workspace.home if workspace.home.exists() else workspace.home.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < DISK_GB:
        return Finding(
            "disk",
            "warning",
            f"{free:.1f} GB free at {folder}, {DISK_GB:.0f} wanted",
            "Free some space, or move the home with ONEREWARD_HOME.",
        )
    return Finding("disk", "ok", f"{free:.1f} GB free at {folder}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", "ok", f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB")
    return Finding(
        "GPU", "warning", "none that torch sees", "Not needed for the mini preset. For others install the driver and a CUDA build of torch."
    )


def _onnxruntime() -> Finding:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not installed:
        return Finding("ONNX Runtime", "error", "not installed", 'Run pip install -e ".[cpu]" (or ".[gpu]").')
    if len(installed) == 2:
        remedy = "They overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one extra."
        return Finding("ONNX Runtime", "error", "the CPU and the GPU package are both installed", remedy)
    return Finding("ONNX Runtime", "ok", f"{installed[0]} {_version(installed[0])}")


def _engine() -> Finding:
    try:
        from ops.build_engine import find_backend
    except ImportError as error:  # ONNX Runtime comes with the same extra
        return Finding("engine builder", "error", f"cannot be looked for: {error}", 'Run pip install -e ".[cpu]" (or ".[gpu]").')
    return Finding("engine builder", "ok", find_backend().name)


def _antlr() -> Finding:
    version = _version("antlr4-python3-runtime") or "none"
    if version.startswith("4.13"):
        return Finding("antlr", "ok", version)
    found = f'{version}, pinned by DVC: Dagster\'s selection strings crash (`--select`, `selection="a"`); this project uses objects only'
    return Finding("antlr", "warning", found, f"Only if you want selection strings: {ANTLR_REMEDY}")


def _guidance(settings: Settings) -> Finding:
    """Are a policy's checkpoints looked at with the guidance that its edits are measured with? Steps may differ: fewer cost less."""
    from ops.evaluate import EvaluateConfig
    from ops.policy_config import TrainPolicyConfig

    watched, measured = resolve(settings, "policy", TrainPolicyConfig), resolve(settings, "evaluation", EvaluateConfig)
    wanted: dict[str, object] = {"watch_true_cfg": measured.true_cfg, "guidance_scale": measured.guidance_scale}
    if measured.true_cfg > 1:
        wanted["negative_prompt"] = measured.negative_prompt
    others = {name: value for name, value in wanted.items() if getattr(watched, name) != value}
    if not others:
        return Finding("guidance", "ok", f"true_cfg {measured.true_cfg:g}, of checkpoints and in the evaluation")
    found = "; ".join(f"policy.{name} is {getattr(watched, name)!r}, the evaluation's {value!r}" for name, value in others.items())
    remedy = "Set in the preset's `policy`: " + ", ".join(f"{name}: {value!r}" for name, value in others.items())
    if set(others) - {"watch_true_cfg"}:
        remedy += " (of the training too; or change the evaluation)"
    return Finding("guidance", "warning", f"checkpoints are not looked at as they will be measured: {found}", remedy)


def _store(workspace: Workspace) -> Finding:
    versions = workspace.store.versions()
    return Finding("store", "ok", f"{len(versions)} versions in {workspace.home}")


def _labels(workspace: Workspace) -> Finding:
    from infra.labels import LabelStore

    return Finding("labels", "ok", f"{LabelStore(workspace.labels_url).count()} labels")


def _weights(settings: Settings) -> Finding:
    local = [
        source for source in (settings.flux, settings.judge, settings.clip, settings.second_judge) if source and not source.startswith(HUB)
    ]
    missing = [source for source in local if not (ROOT / source).is_dir()]
    if missing:
        return Finding("weights", "warning", f"{', '.join(missing)} not here yet", "`onereward run` fetches them; by hand: dvc pull")
    return Finding("weights", "ok", f"{settings.flux}, {settings.judge}")


def _lakefs(workspace: Workspace) -> Finding:
    """Reachable, credentials accepted, and the store's repository there or possible to make. What cannot be is raised with its remedy."""
    repository = workspace.where.removeprefix(LAKEFS)
    used = repository != workspace.where
    if not used and not os.environ.get(ENDPOINT[0]):
        return Finding("lakeFS", "ok", f"not used ({ENDPOINT[0]} is not set)")
    access = Access.from_env()
    server = open_server(repository if used else UNUSED, retries=1, timeout=urllib3.Timeout(connect=3, read=10))
    found = f"{access.endpoint}, as {server.user()}"
    if not used:
        return Finding("lakeFS", "ok", f"{found}; not the store of this preset")
    if not server.exists():
        return Finding("lakeFS", "ok", f"{found}; the repository {repository} is not there yet and will be made in {server.namespace()}")
    if not server.protected():
        return Finding("lakeFS", "ok", f"{found}; {MAIN} of {repository} is not protected yet, and will be before the first version")
    return Finding("lakeFS", "ok", f"{found}; {repository}, {MAIN} protected")


def _signing(workspace: Workspace) -> Finding:
    keys = workspace.keys
    trusted = f"{len(keys.trusted)} trusted"
    if not keys.private.exists():
        found = (
            f"{trusted}, no private key: this home verifies and does not sign" if keys.trusted else "none yet: the first run makes a pair"
        )
        return Finding("signing key", "ok", found)
    if keys.private.stat().st_mode & 0o077:
        return Finding("signing key", "warning", f"others may read {keys.private}", f"chmod 600 {keys.private}; rotate it if they did")
    return Finding("signing key", "ok", f"{keys.private}, {trusted}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(settings: Settings, workspace: Workspace) -> Iterator[Finding]:
    """Look at everything; what cannot be looked at is an error with its remedy, never an exception."""
    looks: dict[str, Callable[[], Finding]] = {
        "cores": lambda: _cores(settings),
        "memory": _memory,
        "disk": lambda: _disk(workspace),
        "GPU": _gpu,
        "ONNX Runtime": _onnxruntime,
        "engine builder": _engine,
        "weights": lambda: _weights(settings),
        "guidance": lambda: _guidance(settings),
        "store": lambda: _store(workspace),
        "labels": lambda: _labels(workspace),
        "signing key": lambda: _signing(workspace),
        "lakeFS": lambda: _lakefs(workspace),
        "antlr": _antlr,
    }
    for name, look in looks.items():
        try:
            yield look()
        except OneRewardError as error:
            yield Finding(name, "error", error.what, error.remedy)
