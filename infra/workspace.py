"""The workspace: everything the chain keeps between runs lies under one folder, its home.

    workspace = Workspace.from_env()      # ONEREWARD_HOME, else .onereward in the current folder
    workspace.store.versions("release")

Removing the home removes all of it; nothing is written anywhere else, unless the store is told to: ONEREWARD_STORE, or the
preset's line `store:`, is one of
    dvc                         a DVC registry under the home (default)
    dvc+s3://bucket/prefix      the same, its bytes also on an S3-compatible server (AWS_ENDPOINT_URL for other servers than AWS)
    dvc+/mnt/shared/artifacts   the same, its bytes also in another folder
    lakefs://repository         a lakeFS repository; the server is LAKEFS_ENDPOINT
Credentials come from the environment alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infra.disk import writing
from infra.signing import Keys
from infra.stores.base import ArtifactStore
from infra.stores.dvc import DvcStore
from infra.stores.lakefs import LakeFSStore
from infra.stores.lakefs_server import open_server
from models.errors import ConfigError

HOME_VARIABLE = "ONEREWARD_HOME"
STORE_VARIABLE = "ONEREWARD_STORE"
LABELS_VARIABLE = "ONEREWARD_LABELS_URL"  # e.g. postgresql+psycopg2://...
DEFAULT_HOME = ".onereward"
DEFAULT_STORE = "dvc"
REMEDY = f"Set {HOME_VARIABLE} to a folder that may be written to."
STORES = f"Let {STORE_VARIABLE} be dvc, dvc+<folder or s3://bucket/prefix> or lakefs://<repository>."
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # safe as a folder name

START_TIMEOUT_S = 600  # ours: how long a launched run may take to announce its process
# One run and one pool-tagged op at a time: the heavy stages share one accelerator, or two cores. Retries are off because a
# stage that failed at a gate fails again, and one that was interrupted resumes from its work folder when it is started again.
# Monitoring ends runs that never start and frees the pool of those that were killed. No path is named: Dagster then keeps its
# databases beside this file, and the home can be moved.
DAGSTER_YAML = f"""\
telemetry:
  enabled: false
run_retries:
  enabled: false
run_monitoring:
  enabled: true
  start_timeout_seconds: {START_TIMEOUT_S}
  free_slots_after_run_end_seconds: 60
concurrency:
  pools:
    default_limit: 1
  runs:
    max_concurrent_runs: 1
"""


@dataclass(frozen=True)
class Workspace:
    """The paths and stores under a home. Folders are made when first asked for: ConfigError or DiskFull where that cannot be."""

    home: Path
    where: str = DEFAULT_STORE  # the store, as ONEREWARD_STORE names it

    @classmethod
    def from_env(cls, home: Path | None = None) -> Workspace:
        """The workspace at `home`, else at ONEREWARD_HOME, else at .onereward, with the store ONEREWARD_STORE names.

        Raises ConfigError when a file is in its place.
        """
        path = (home or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)).expanduser().resolve()
        with writing(path, REMEDY):  # a folder above it may be closed
            if path.exists() and not path.is_dir():
                raise ConfigError(f"The home {path} is not a folder.", f"Remove the file or set {HOME_VARIABLE} to a folder.")
        return cls(path, os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifact store, made on first use. Raises ConfigError for one that does not exist."""
        kind, _, place = self.where.partition("+")
        if kind == "dvc":
            return DvcStore(self.home / "registry", remote=place or None)
        if self.where.startswith("lakefs://"):
            return LakeFSStore(open_server(self.where.removeprefix("lakefs://")), self.home / "lakefs")
        raise ConfigError(f"There is no store of the kind {self.where.partition(':')[0]!r}.", STORES)

    @property
    def keys(self) -> Keys:
        """The signing key, where this home holds it, and the public keys it trusts."""
        return Keys(self.home / "keys")

    @property
    def labels_url(self) -> str:
        """The label database, as an SQLAlchemy URL: what ONEREWARD_LABELS_URL says, else a SQLite file under the home."""
        return os.environ.get(LABELS_VARIABLE) or f"sqlite:///{_made(self.home) / 'labels.db'}"

    @property
    def reports(self) -> Path:
        return _made(self.home / "reports")

    @property
    def dagster_home(self) -> Path:
        """DAGSTER_HOME, with a `dagster.yaml` that is written once and the user's to change."""
        folder = _made(self.home / "dagster")
        config = folder / "dagster.yaml"
        if not config.exists():
            with writing(config, REMEDY):
                config.write_text(DAGSTER_YAML)
        return folder

    @property
    def tmp(self) -> Path:
        """Where drafts are written: on the home's own disk, whatever the system's temporary folder is."""
        return _made(self.home / "tmp")

    def scratch(self, key: str) -> Path:
        """The work folder of one piece of work, named by its key: it outlives an interruption, so that the work can resume."""
        if not KEY.fullmatch(key):
            raise ConfigError(f"{key!r} cannot name a work folder.", "Use letters, digits, dots, dashes and underscores.")
        return _made(self.home / "work" / key)


def _made(folder: Path) -> Path:
    with writing(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
