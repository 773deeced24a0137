"""What `onereward versions` prints, and where `onereward edit` takes its networks from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from assets.settings import Settings
from assets.sources import ROOT
from infra.data import ensure_data, weights
from infra.stores.base import ArtifactStore
from infra.workspace import Workspace
from models.errors import ConfigError, UnknownVersion
from ops.gate import POLICY_PREFIX
from ops.promote import RELEASE, STAGES


def version_lines(store: ArtifactStore, name: str | None, *, verify: bool) -> Iterator[str]:
    """One line per version, oldest first. Raises UnknownVersion for a name that was never stored, DigestMismatch on `verify`."""
    versions = store.versions(name)
    if name and not versions:
        known = ", ".join(sorted({version.ref.name for version in store.versions()})) or "none yet"
        raise UnknownVersion(f"No version of {name!r} is stored.", f"Names are: {known}.")
    pointers: dict[tuple[str, str], list[str]] = {}
    for artifact in dict.fromkeys(version.ref.name for version in versions):
        for stage in STAGES:
            if ref := store.stage(artifact, stage):
                pointers.setdefault((artifact, ref.digest), []).append(stage)
    yield f"{'name':16} {'version':>7}  {'digest':12} {'size':>10}  {'made':19}  {'run':8}  stages"
    for version in versions:
        ref = version.ref
        if verify:
            store.get(ref)
        stages = ", ".join(pointers.get((ref.name, ref.digest), []))
        made = version.created[:19].replace("T", " ")
        line = (
            f"{ref.name:16} {version.number:>7}  {ref.digest[:12]} {ref.size / 1e6:>7.2f} MB  {made:19}  {version.run_id[:8]:8}  {stages}"
        )
        yield line.rstrip() + (" verified" if verify else "")


def editor(settings: Settings, workspace: Workspace, source: str) -> tuple[Path, Path | None]:
    """Pipeline folder and policy folder for `base`, a stage of the release, or the digest of a release or policy.

    Raises UnknownVersion, ConfigError for an artifact that edits nothing, MissingWeights.
    """
    if source in STAGES:
        ref = workspace.store.stage(RELEASE, source)
        if ref is None:
            raise UnknownVersion(
                f"No release is in {source}.", "Use --from base, or promote a release first (`onereward versions release`)."
            )
        return workspace.store.get(ref) / "model", None
    if source == "base":
        return base_pipeline(settings), None
    ref = workspace.store.version(source).ref
    if ref.name == RELEASE:
        return workspace.store.get(ref) / "model", None
    if not ref.name.startswith(POLICY_PREFIX):
        raise ConfigError(f"{source} is a version of {ref.name}, which edits nothing.", "Name a release or a policy.")
    return base_pipeline(settings), workspace.store.get(ref)


def base_pipeline(settings: Settings) -> Path:
    """The base's folder, fetched first where it is part of the repository's data."""
    if settings.flux.startswith("data/"):
        ensure_data(ROOT)
    return weights(settings.flux, ROOT)
