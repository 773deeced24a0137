"""The shipped data and the base weights: fetched through the DVC pointer `data.dvc`, found by path or hub id.

    ensure_data(repo_root)                         # data/ as data.dvc says, from the remote kept in the repository
    weights("data/mini/flux-fill", repo_root)      # a local folder
    weights("hub:black-forest-labs/FLUX.1-Fill-dev", repo_root)

Paths are relative to the repository; absolute ones stand for themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import filelock

from infra.stores.base import directory_digest
from models.errors import BrokenWeights, MissingWeights, ServerUnreachable

POINTER = "data.dvc"
HUB = "hub:"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# FLUX repositories hold every network once more, as single files; CLIP's hold pickles and other frameworks' weights beside safetensors.
DOUBLES = ["flux1-*.safetensors", "ae.safetensors", "*.h5", "*.msgpack", *(f"*{kind}" for kind in PICKLES)]


def ensure_data(repo_root: Path) -> Path:
    """Make `data/` what `data.dvc` says and return it. Offline once cloned: the default remote lies in the repository.

    Raises MissingWeights when the pointer or the bytes behind it are not there.
    """
    if not (repo_root / POINTER).exists():
        raise MissingWeights(
            f"{repo_root / POINTER} is missing.", "Clone the repository again, or make data/ with `onereward pretrain-mini`."
        )
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    lock = repo_root / ".dvc" / "tmp" / "data.lock"  # DVC itself gives up after three seconds where another process is fetching
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock), Repo(str(repo_root)) as repo:
            pointer = str(repo_root / POINTER)  # a relative one would be looked up in the current folder
            if not (repo_root / "data").exists() or repo.status(targets=[pointer]):
                repo.pull(targets=[pointer], force=False)
    except DvcException as error:
        raise MissingWeights(
            f"data/ cannot be made from {POINTER}: {error}.",
            "Check the remote in .dvc/config; if you changed data/ yourself, move your files away or record them with `dvc add data`.",
        ) from error
    return repo_root / "data"


def weights(source: str, repo_root: Path) -> Path:
    """The local folder of base weights: a path (relative to the repository) or `hub:<id>[@revision]`, downloaded once.

    Raises MissingWeights, ServerUnreachable, or BrokenWeights for a folder that holds a pickle.
    """
    if not source.startswith(HUB):
        folder = repo_root / source
        if not folder.is_dir():
            raise MissingWeights(
                f"There is no weights folder {folder}.", "Run `dvc pull`, or correct `models` or `embedder` in the preset."
            )
        if pickles := sorted(path for path in folder.rglob("*") if path.suffix in PICKLES):
            raise BrokenWeights(f"{pickles[0]} is a pickle, which runs code when read.", "Convert it to safetensors, or take it away.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=DOUBLES))
    except LocalEntryNotFoundError as error:
        raise ServerUnreachable(
            f"The hub does not answer and {name} is not in its cache.", "Check the network, or name a local folder in the preset."
        ) from error
    except HfHubHTTPError as error:
        raise MissingWeights(f"The hub does not hand out {name}: {error}.", "Accept its licence there and set HF_TOKEN.") from error


def weights_digest(folder: Path, cache: Path) -> str:
    """SHA-256 (hex) of a weights folder. Large checkpoints are read once: `cache` remembers digests by file sizes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamp = hashlib.sha256("".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files).encode()).hexdigest()
    known = _remembered(cache)
    if stamp not in known:
        known[stamp] = directory_digest(folder)[0]
        draft = cache.with_name(f"{cache.name}.{os.getpid()}")  # of its own: several processes may write at once
        draft.write_text(json.dumps(known))
        draft.replace(cache)
    return known[stamp]


def _remembered(cache: Path) -> dict[str, str]:
    """What the cache holds; nothing where it is absent or unreadable, because every digest can be computed again."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
