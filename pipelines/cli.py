"""The command line: `onereward --help`. Each command is a thin door to an op or to Dagster; `ops/` does the work.

An error that the user can act on ends in one line on stderr and exit code 1, without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.errors import ConfigError, OneRewardError
from pipelines.cli_promotion import HomeOption, PresetOption, keys_app, promotion_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OneReward: one judge tunes FLUX Fill, versioned and gated.",
)
labels_app = typer.Typer(no_args_is_help=True, help="Candidates for people to judge, and their labels in and out of the database.")
app.add_typer(labels_app, name="labels")
app.add_typer(promotion_app)
app.add_typer(keys_app, name="keys")

EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130


@app.command()
def run(
    preset: PresetOption = None,
    home: HomeOption = None,
    require_promotion: Annotated[
        bool, typer.Option("--require-promotion", help="Exit with 3 when promotion was refused, or is left to a person (auto_promote off).")
    ] = False,
    next_round: Annotated[
        bool,
        typer.Option("--next-round", help="Go on from production: label its samples, refit the judge, train its policy further."),
    ] = False,
) -> None:
    """Take images through the whole chain, curation to promotion, and write a report."""
    from pipelines.home import enter

    settings, workspace = enter(preset, home)
    from pipelines import next_round as further
    from pipelines.report import run_and_report

    if next_round:
        settings = further.next_round(settings, workspace.store)
    outcome, report = run_and_report(settings, workspace)
    if report:
        print(f"report: {report}")
    if outcome.ending == "interrupted":
        print(outcome.message, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)
    if outcome.ending == "failed":
        print(f"error: {outcome.message}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{outcome.ending}: {outcome.message}")
    if outcome.ending in ("refused", "released") and require_promotion:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def dev(preset: PresetOption = None, home: HomeOption = None, port: Annotated[int, typer.Option(help="On 127.0.0.1 only.")] = 3000) -> None:
    """Dagster's UI with its daemon (schedules, sensors, queued runs) on 127.0.0.1."""
    from assets.sources import ROOT
    from infra.data import ensure_data
    from pipelines.home import enter

    settings, workspace = enter(preset, home)
    from dagster import DagsterInstance

    from pipelines.dead_runs import end_dead_runs

    if any(source.startswith("data/") for source in (settings.flux, settings.judge)):
        ensure_data(ROOT)
    with DagsterInstance.get() as instance:
        end_dead_runs(instance, workspace)
    print(f"http://127.0.0.1:{port}")
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is deaf to it, and Dagster then to SIGTERM as well
    arguments = ["-m", "dagster", "dev", "-m", "pipelines.definitions", "-d", str(ROOT), "-h", "127.0.0.1", "-p", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])


@app.command()
def doctor(preset: PresetOption = None, home: HomeOption = None) -> None:
    """What this machine offers the chain; for every shortcoming its remedy. Exits 1 when something is broken."""
    from pipelines.doctor import examine
    from pipelines.home import enter

    findings = list(examine(*enter(preset, home)))
    for finding in findings:
        print(f"{finding.level:8} {finding.name:15} {finding.found}")
        if finding.remedy:
            print(f"{'':24} -> {finding.remedy}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def edit(
    image: Path,
    mask: Path,
    prompt: Annotated[str | None, typer.Option(help="What to make inside the mask.")] = None,
    task: Annotated[str | None, typer.Option(help="A task of the taxonomy; one with a fixed prompt needs no --prompt.")] = None,
    source: Annotated[str, typer.Option("--from", help="production, base, or the digest of a release or policy.")] = "production",
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("edited.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps; else those of the release's figures or of the preset.")] = None,
    seed: int = 0,
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Edit one picture: what is white in MASK is made anew.

    A release is sampled as it was for its figures, the base and a policy as the preset's evaluation does.
    """
    from pipelines.home import enter

    settings, workspace = enter(preset, home)
    from assets.settings import resolve
    from assets.sources import ROOT
    from infra.disk import replacing
    from models.taxonomy import Taxonomy
    from ops.edit import EditConfig, check_picture_name
    from ops.edit import edit as edit_picture
    from ops.evaluate import EvaluateConfig
    from pipelines.versions import editor

    taxonomy = Taxonomy.load(ROOT / settings.taxonomy if settings.taxonomy else None)
    check_picture_name(out)
    with replacing(out) as draft:  # a place that cannot be written to is known before the sampling
        base, policy, measured = editor(settings, workspace, source)
        if measured is None and source != "base" and policy is None:
            print("This release does not say how it was sampled for its figures: taken from the preset's evaluation.", file=sys.stderr)
        sampling = measured or resolve(settings, "evaluation", EvaluateConfig).sampling()
        config = EditConfig(seed=seed, **sampling | ({"steps": steps} if steps else {}))
        edit_picture(config, base, image, mask, policy=policy, prompt=prompt, task=task, taxonomy=taxonomy).save(draft)
    print(out)


@app.command()
def report(
    run_number: Annotated[int | None, typer.Argument(help="Number of a run; the latest without one.")] = None, home: HomeOption = None
) -> None:
    """Where a run's report is, and how it ended."""
    from pipelines.home import enter
    from pipelines.report import find_report, headline

    _, workspace = enter(None, home)
    folder = find_report(workspace, run_number)
    print(headline(folder))
    print(folder / "report.html")


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only listed.")] = False,
    home: HomeOption = None,
) -> None:
    """What no version, stage or live run refers to: leftovers in the store of work that was cut short."""
    from dagster import DagsterInstance

    from pipelines.dead_runs import end_dead_runs
    from pipelines.home import enter

    _, workspace = enter(None, home)
    with DagsterInstance.get() as instance:
        live = [run.run_id for run in end_dead_runs(instance, workspace)]
    report = workspace.store.gc(dry_run=not delete, live=live)
    for path in report.paths:
        print(path)
    ending = "would be removed: run it again with --delete" if report.dry_run else "removed"
    print(f"{len(report.paths)} files, {report.bytes / 1e6:.1f} MB {ending}")


@app.command("pretrain-mini")
def pretrain_mini_command(
    out: Annotated[Path, typer.Option(help="Folder for the weights: absent, empty, or of an interrupted run.")] = Path("data/mini"),
    start: Annotated[Path | None, typer.Option(help="Folder of an earlier base to go on from; random weights without one.")] = None,
) -> None:
    """Train the mini preset's base weights (they are shipped; this is their recipe)."""
    from infra.disk import writing
    from infra.progress import Progress
    from models.taxonomy import Taxonomy
    from ops.pretrain_mini import FURTHER, PretrainConfig, pretrain_mini, resumable

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if not resumable(out):
        raise ConfigError(f"{out} is not empty and not of an interrupted run.", "Name another folder with --out, or move this one away.")
    pretrain_mini(FURTHER if start else PretrainConfig(), out, Progress(print), Taxonomy.load(), start)
    print(out)


@labels_app.command("show")
def show_candidates(
    folder: Annotated[Path, typer.Argument(help="Absent or empty.")],
    candidates: Annotated[str, typer.Option(help="Digest of the candidates; the newest without one.")] = "",
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Write what people are to judge: a sheet per request, and questions.jsonl to fill in and import."""
    from pipelines.home import enter
    from pipelines.labels import show

    settings, workspace = enter(preset, home)
    print(f"{show(settings, workspace, folder, candidates)} requests in {folder}")


@labels_app.command("import")
def import_labels(
    file: Path,
    candidates: Annotated[str, typer.Option(help="Digest of the candidates that were judged; the newest without one.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Let new answers stand instead of the database's.")] = False,
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Add human labels from JSON Lines: annotator, order shown, best, worst or tie per dimension. All or none."""
    from pipelines.home import enter
    from pipelines.labels import import_file

    settings, workspace = enter(preset, home)
    print(f"{import_file(settings, workspace, file, candidates, replace=replace)} labels new or changed")


@labels_app.command("export")
def export_labels(
    file: Path,
    candidates: Annotated[str, typer.Option(help="Digest of the candidates; the newest without one.")] = "",
    preset: PresetOption = None,
    home: HomeOption = None,
) -> None:
    """Write the labels given for one version of the candidates as JSON Lines."""
    from pipelines.home import enter
    from pipelines.labels import export_file

    _, workspace = enter(preset, home)
    print(f"{export_file(workspace, file, candidates)} lines of labels in {file}")


def main() -> None:
    """Entry point of the `onereward` command."""
    try:
        app()
    except OneRewardError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
