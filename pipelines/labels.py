"""What people are shown, and their labels in and out, for one version of the candidates."""

from __future__ import annotations

from pathlib import Path

from assets.settings import Settings
from assets.sources import ROOT
from infra.labels import LabelStore
from infra.stores.base import ArtifactRef, ArtifactStore, Version
from infra.workspace import Workspace
from models.errors import BadLabel, UnknownVersion
from models.taxonomy import Taxonomy
from ops.label import export_labels, import_labels
from ops.show import show_candidates

CANDIDATES, CURATED = "candidates", "curated_dataset"


def _candidates(store: ArtifactStore, digest: str) -> Version:
    versions = store.versions(CANDIDATES)
    if not versions:
        raise UnknownVersion("No candidates are stored yet.", "Run the chain first.")
    version = store.version(digest) if digest else versions[-1]
    if version.ref.name != CANDIDATES:
        raise BadLabel(f"{digest} is a version of {version.ref.name}, not of {CANDIDATES}.", "See `onereward versions candidates`.")
    return version


def _curated(version: Version) -> ArtifactRef:
    return next(parent for parent in version.parents if parent.name == CURATED)


def _taxonomy(settings: Settings) -> Taxonomy:
    return Taxonomy.load(ROOT / settings.taxonomy if settings.taxonomy else None)


def show(settings: Settings, workspace: Workspace, folder: Path, digest: str) -> int:
    """Write what people are to judge into a folder; the number of requests. Raises ConfigError for one that is not empty."""
    version = _candidates(workspace.store, digest)
    return show_candidates(workspace.store.get(_curated(version)), workspace.store.get(version.ref), folder, _taxonomy(settings))


def import_file(settings: Settings, workspace: Workspace, file: Path, digest: str, *, replace: bool) -> int:
    """Add a file of labels, all of it or nothing; the number of answers that are new or changed. Raises BadLabel, BadManifest."""
    version = _candidates(workspace.store, digest)
    return import_labels(
        file,
        workspace.store.get(_curated(version)),
        workspace.store.get(version.ref),
        LabelStore(workspace.labels_url),
        version.ref.digest,
        _taxonomy(settings),
        replace=replace,
    )


def export_file(workspace: Workspace, file: Path, digest: str) -> int:
    """Write the labels of one version of the candidates; the number of lines."""
    return export_labels(file, LabelStore(workspace.labels_url), _candidates(workspace.store, digest).ref.digest)
