"""The commands that move production and tell of it: `onereward promote`, `rollback`, `approve`, `versions`, `show`, `diff`, `audit`,
`verify`, `keys`. docs/promotion.md says when to use which."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

promotion_app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="The key that signs gate reports, releases and the audit log.")

PresetOption = Annotated[
    str | None, typer.Option("--preset", help="Name of a preset or path of a YAML file; else ONEREWARD_PRESET, else mini.")
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Where versions, runs and reports are kept; else ONEREWARD_HOME, else .onereward.")
]
Digest = Annotated[str, typer.Argument(help="Digest of a version (8 digits or more).")]
Approver = Annotated[str, typer.Option("--approver", help="Who answers for the move; kept in the audit log.", envvar="USER")]
Reason = Annotated[str, typer.Option(help="Why; kept in the audit log.")]
STAGE = "candidate, staging or production."


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


@promotion_app.command()
def versions(
    name: Annotated[str | None, typer.Argument(help="An artifact's name; all without one.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every digest from the stored bytes.")] = False,
    home: HomeOption = None,
) -> None:
    """Every stored version: number, digest, size, stages, when and by which run."""
    from pipelines.home import enter
    from pipelines.versions import version_lines

    _, workspace = enter(None, home)
    for line in version_lines(workspace.store, workspace.keys, name, verify=verify):
        print(line)


@promotion_app.command()
def show(digest: Digest, home: HomeOption = None) -> None:
    """Everything recorded about a version: parents, gates with their evidence, approval, stages."""
    from pipelines.home import enter
    from pipelines.versions import show_lines

    _, workspace = enter(None, home)
    for line in show_lines(workspace.store, workspace.keys, digest):
        print(line)


@promotion_app.command()
def tag(digest: Digest, label: Annotated[str, typer.Argument(help="Small letters, digits, - and _.")], home: HomeOption = None) -> None:
    """Give a version a label that never moves, shown by `versions`."""
    from pipelines.home import enter

    _, workspace = enter(None, home)
    version = workspace.store.version(digest)
    workspace.store.tag(version.ref, label)
    print(f"{version.ref.name} v{version.number} ({version.ref.digest[:8]}) is labelled {label}")


@promotion_app.command()
def diff(old: Digest, new: Digest, home: HomeOption = None) -> None:
    """What differs between two versions: parents, configuration, figures, files."""
    from pipelines.home import enter
    from pipelines.versions import diff_lines

    _, workspace = enter(None, home)
    for line in diff_lines(workspace.store, old, new):
        print(line)


@promotion_app.command()
def promote(
    digest: Annotated[str, typer.Argument(help="Digest of a release (8 digits or more).")],
    stage: Annotated[str, typer.Argument(help=STAGE)],
    approver: Approver = "unknown",
    reason: Reason = "by hand",
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Move a stage to a release, if the gates' evidence for exactly these digests passes under the preset's thresholds."""
    from pipelines.home import enter
    from pipelines.promotion import promote_lines

    for line in promote_lines(*enter(preset, home), digest, stage, approver=approver, reason=reason, warn=_warn):
        print(line)


@promotion_app.command()
def rollback(
    stage: Annotated[str, typer.Argument(help=STAGE)] = "production",
    approver: Approver = "unknown",
    reason: Reason = "by hand",
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Move a stage back to the release it pointed to before."""
    from pipelines.home import enter
    from pipelines.promotion import rollback_lines

    for line in rollback_lines(*enter(preset, home), stage, approver=approver, reason=reason, warn=_warn):
        print(line)


@promotion_app.command()
def approve(
    digest: Annotated[str, typer.Argument(help="Digest of a release (8 digits or more).")],
    approver: Annotated[str, typer.Option("--approver", help="The person who answers for it.")],
    reason: Reason,
    licence_acknowledged: Annotated[bool, typer.Option(help="The preset's `base_licence` was read and allows this use.")] = False,
    parity: Annotated[Path | None, typer.Option(help="Engine parity report: JSON with engine (digest), relative_error, device.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="A gate that may have failed, as artifact/gate; repeatable.")] = None,
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Record that a person answers for a release; an override of a gate is such a record, with its reason."""
    from pipelines.home import enter
    from pipelines.promotion import approve_lines

    lines = approve_lines(
        *enter(preset, home),
        digest,
        approver=approver,
        reason=reason,
        licence_acknowledged=licence_acknowledged,
        parity=parity,
        overrides=override or [],
    )
    for line in lines:
        print(line)


@promotion_app.command()
def audit(home: HomeOption = None) -> None:
    """Every move of a stage, approval and note, and whether the log holds. Exits 1 naming the first entry that does not."""
    from pipelines.home import enter
    from pipelines.versions import audit_lines

    _, workspace = enter(None, home)
    for line in audit_lines(workspace.store, workspace.keys):
        print(line)


@promotion_app.command()
def verify(
    digest: Annotated[str | None, typer.Argument(help="Digest of a version; production without one.")] = None, home: HomeOption = None
) -> None:
    """Recompute every digest from production to the source images, check signatures, evidence and audit log. Exits 1 at a mismatch."""
    from ops.verify import verify_lines
    from pipelines.home import enter

    _, workspace = enter(None, home)
    for line in verify_lines(workspace.store, workspace.keys, workspace.home, digest):
        print(line)


@keys_app.command("create")
def create_key(home: HomeOption = None) -> None:
    """Make the signing key (at ONEREWARD_SIGNING_KEY, else in the home) and trust it."""
    from pipelines.home import enter

    _, workspace = enter(None, home)
    fingerprint = workspace.keys.create()
    print(f"{workspace.keys.private}\n{workspace.keys.folder / 'trusted' / fingerprint}.pub")


@keys_app.command("rotate")
def rotate_key(reason: Reason, approver: Approver = "unknown", home: HomeOption = None) -> None:
    """Replace the signing key and let the new one vouch for the audit log so far."""
    from pipelines.home import enter
    from pipelines.promotion import rotate_lines

    _, workspace = enter(None, home)
    for line in rotate_lines(workspace, approver=approver, reason=reason):
        print(line)
