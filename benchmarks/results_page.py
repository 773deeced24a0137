"""docs/results.md and its plots, whole, from the stored figures of `python -m benchmarks.run` and `python -m benchmarks.label_curve`.

    python -m benchmarks.results_page          # measures nothing

Every figure on the page is read from the two JSON files. A target is met when every seed meets it; where a run did not come so far
there is no figure, and the target is missed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import label_section
from benchmarks.markdown import NONE, interval, rate, sampling, table
from benchmarks.rows import locked, rows
from benchmarks.targets import MODES, Run, sealed, targets
from infra.disk import replacing
from models.taxonomy import Taxonomy
from ops.label import LabelConfig
from ops.pictures import against_steps, rates
from ops.policy_watch import hindsight, unrewarded
from ops.probe import JUDGE, SECOND, TRUTH

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench.json"
LABELS = ROOT / "benchmarks" / "results" / "label_curve.json"
PAGE = ROOT / "docs" / "results.md"
NAMED = {"judge": JUDGE, "second judge": SECOND, "truth": TRUTH}

INTRODUCTION = """\
Written by `python -m benchmarks.results_page` from the files in `benchmarks/results/`: no figure here is typed by hand. The records behind
the runs lie beside them (`python -m benchmarks.records` computes the figures from them again). Rates are
shares, in brackets 95% intervals drawn over scenes ([statistics.md](statistics.md)). Win rates are over the base's edit from the same
noise, ties half, on sealed test scenes: by acceptance, the measures with which nobody labelled, and by the annotator, those it ranks
with ([measures.md](measures.md))."""

ABOUT_SEEN = """\
Classified from the picture alone ([measures.md](measures.md#what-is-to-be-seen-modelsminiseenpy)): shares of the sealed edits that show
what was asked, and the delivered mode's less the base's, of the same requests from the same noise."""

ABOUT_JUDGE = """\
Sealed: accuracy on sealed test pairs labelled without error (training labels: error rate {error}), how many they are, and the base judge's
accuracy. On edits: accuracy on the better mode's test edits against the base's, where the annotator's measures name a winner."""

ABOUT_CHECKPOINTS = """\
A second judge chose, fitted on the labels of other source images, and measures that need no target had a say
([statistics.md](statistics.md#splits)). The truth, a win rate on validation scenes, was recorded beside it; no choice read it. Of both
judges and of the truth it is the share of comparisons won."""


def write_page(results: Path = RESULTS, labels: Path = LABELS, page: Path = PAGE) -> Path:
    """Write the page, and the plots into the folder of its name beside it; returns the page's path."""
    with locked(results):
        runs, fits = rows(results), rows(labels)
        folder, plots = page.with_suffix(""), _plots(runs, fits)
        text = _page(runs, fits, {name: f"{folder.name}/{name}.png" for name in plots})
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in plots.items():
            figure.savefig(folder / f"{name}.png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        with replacing(page) as draft:
            draft.write_text(text, encoding="utf-8")
    return page


def _page(runs: list[Run], fits: list[dict[str, Any]], drawn: dict[str, str]) -> str:
    taxonomy = Taxonomy.load()

    def picture(name: str, told: str) -> str:
        return f"![{told}]({drawn[name]})" if name in drawn else ""

    parts = [
        "# Results",
        INTRODUCTION,
        "## Runs",
        _runs(runs),
        f"Edits: {'; '.join(sorted({sampling(run['preset']) for run in runs})) or NONE}.",
        "## Targets",
        "Of every seed, not of their mean: one seed that misses is a miss.",
        _targets(runs),
        "## Win rates by task",
        _by_task(runs),
        "## Win rates by cell",
        *(
            part
            for mode in MODES
            for part in (f"### {mode}", _wins(runs, taxonomy, mode), picture(f"cells-{mode}", f"win rate per cell, {mode}"))
        ),
        "## What is to be seen",
        ABOUT_SEEN,
        _seen(runs),
        "## The judge by cell",
        ABOUT_JUDGE.format(error=", ".join(sorted({_error_rate(run) for run in runs})) or NONE),
        _judge(runs, taxonomy),
        picture("judge", "judge accuracy per cell"),
        "Cells that gave no reward, their lower bound on validation pairs being under the preset's `least_judged`:",
        _switched_off(runs, taxonomy),
        "## Checkpoints: chosen, and best in hindsight",
        ABOUT_CHECKPOINTS,
        _checkpoints(runs),
        *(picture(f"curves-{mode}", f"what the judges say and what is true, {mode}") for mode in MODES),
        "## Absolute quality",
        "Mean acceptance measure (higher is better; units in measures.md) on the test scenes, mean over seeds.",
        _absolute(runs, taxonomy),
        "## Second round",
        _second_rounds(runs),
        "## Gates",
        "Measure of every gate, the cases behind it, and how many its margin needs at 80% power, as the run's own commit had them.",
        _gates(runs),
    ]
    if fits:
        parts += [
            "## How many labels to buy",
            label_section.ABOUT,
            label_section.label_table(fits),
            label_section.commits_of(fits),
            picture("label_curve", "accuracy against number of labels"),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _error_rate(run: Run) -> str:
    return f"{LabelConfig(**run['preset']['stages'].get('preferences', {})).error_rate:g}"


def _runs(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        machine, release = run["machine"], run["release"]
        end = (
            f"refused: {run['refused']}"
            if run["refused"]
            else f"release v{release['version']}, {release['stage']}"
            if release
            else "no release"
        )
        again = " (resumed)" if run["reused"] else ""
        seconds = f"{run['wall_s']:.0f} s{again}, {run['peak_rss_gb']:.1f} GB"
        where = f"{machine['cores']} cores ({run['threads']} threads), {machine['processor']}, Python {machine['python']}"
        lines.append([str(run["seed"]), f"`{run['command']}`", run["commit"][:13], where, seconds, end.replace("|", "/")])
    return table(["seed", "command", "commit", "machine", "took", "ended"], lines)


def _targets(runs: list[Run]) -> str:
    lines = []
    for target in targets():
        values = [target.measure(run) for run in runs]
        known = [value for value in values if value is not None]
        mean = rate(sum(known) / len(known), 3) if known and len(known) == len(runs) else NONE
        met = sum(target.met(run) for run in runs)
        verdict = "met" if runs and met == len(runs) else f"**missed** ({met} of {len(runs)} met it)"
        lines.append([target.what, target.asked, *(rate(value, 3) for value in values), mean, verdict])
    return table(["target", "asked", *(f"seed {run['seed']}" for run in runs), "mean", "verdict"], lines)


def _modes(runs: list[Run]) -> list[tuple[Run, str, dict[str, Any]]]:
    """Every seed's summary of every mode that was evaluated."""
    return [(run, mode, run["policy"][mode]) for mode in MODES for run in runs if run["policy"] and mode in run["policy"]]


def _by_task(runs: list[Run]) -> str:
    tasks = [task.name for task in Taxonomy.load().active]
    lines = []
    for run, mode, summary in _modes(runs):
        found = {row["task"]: row for row in summary["tasks"]}
        delivered = " (delivered)" if run["best_mode"] == mode else ""
        for told, prefix in (("by acceptance", ""), ("by the annotator", "confirming_")):
            names = f"{prefix}win_rate", f"{prefix}lo", f"{prefix}hi"
            mean = interval(summary, f"{prefix}mean_win_rate", f"{prefix}mean_lo", f"{prefix}mean_hi")
            lines.append([f"{mode}{delivered}", str(run["seed"]), told, *(interval(found.get(task), *names) for task in tasks), mean])
    return table(["mode", "seed", "counted", *tasks, "mean"], lines)


def _seen(runs: list[Run]) -> str:
    """Per task and fact: each seed's requests, base, delivered mode and their difference; then the differences' mean over seeds."""
    evaluated = [run for run in runs if run["seen"] and run["policy"] and run["best_mode"]]
    found = {
        run["seed"]: [run["seen"]["base"], run["seen"][run["best_mode"]], run["policy"][run["best_mode"]]["facts"]] for run in evaluated
    }
    lines = []
    for fact in dict.fromkeys((row["task"], row["fact"]) for base, _, _ in found.values() for row in base):
        line, differences = [*fact], []
        for shares in found.values():
            base, ours, more = (next((row for row in rows if (row["task"], row["fact"]) == fact), None) for rows in shares)
            if more:
                differences.append(more["more"])
            line += [rate(more and more["n"]), rate(base and base["share"]), rate(ours and ours["share"]), interval(more, "more")]
        lines.append([*line, rate(sum(differences) / len(differences)) if differences else NONE])
    columns = [f"seed {seed}: {told}" if told == "n" else told for seed in found for told in ("n", "base", "delivered", "difference")]
    return table(["task", "to be seen", *columns, "mean difference"], lines)


def _cell(cells: Sequence[dict[str, Any]] | None, cell: tuple[str, str]) -> dict[str, Any] | None:
    return next((row for row in cells or () if (row["task"], row["dimension"]) == cell), None)


def _wins(runs: list[Run], taxonomy: Taxonomy, mode: str) -> str:
    lines = []
    for cell in taxonomy.cells:
        line = [*cell]
        for run in runs:
            row = _cell((run["policy"] or {}).get(mode, {}).get("cells"), cell)
            line += [interval(row), interval(row, "confirming_win_rate", "confirming_lo", "confirming_hi"), rate(row and row["n"])]
        lines.append(line)
    columns = [f"seed {run['seed']}, {told}" for run in runs for told in ("by acceptance", "by the annotator", "n")]
    return table(["task", "dimension", *columns], lines)


def _judge(runs: list[Run], taxonomy: Taxonomy) -> str:
    lines = []
    for cell in taxonomy.cells:
        line = [*cell]
        for run in runs:
            row = _cell((sealed(run) or {}).get("cells"), cell)
            summary = (run["policy"] or {}).get(run["best_mode"]) or {}
            on_edits = _cell((summary.get("judge_on_edits") or {}).get("cells"), cell)
            line += [interval(row, "accuracy"), rate(row and row["n"]), rate(row and row.get("base_accuracy"))]
            line += [interval(on_edits, "accuracy"), rate(on_edits and on_edits["n"])]
        lines.append(line)
    columns = [
        f"seed {run['seed']}: {told}" if told == "sealed" else told
        for run in runs
        for told in ("sealed", "n", "base judge", "on edits", "n")
    ]
    return table(["task", "dimension", *columns], lines)


def _switched_off(runs: list[Run], taxonomy: Taxonomy) -> str:
    lines = []
    for run in runs:
        rewarded = next(iter((run["training"] or {}).values()), {}).get("rewarded")
        off = None if rewarded is None else [f"{task}/{name}" for task, name in unrewarded(rewarded, taxonomy)]
        lines.append([str(run["seed"]), NONE if off is None else ", ".join(off) or "none"])
    return table(["seed", "switched off"], lines)


def _checkpoints(runs: list[Run]) -> str:
    lines = []
    for mode in MODES:
        for run in runs:
            if found := hindsight((run["training"] or {}).get(mode)):
                chosen, best = found["chosen"], found["best"]
                says = [rate(chosen["second"]), rate(chosen["judge"])]
                lines.append(
                    [
                        mode,
                        str(run["seed"]),
                        str(chosen["step"]),
                        *says,
                        rate(chosen["measure_win"]),
                        str(best["step"]),
                        rate(best["measure_win"]),
                        rate(found["gap"]),
                    ]
                )
    return table(
        ["mode", "seed", "chosen", "second judge there", "judge there", "truth there", "best in hindsight", "truth there", "gap"], lines
    )


def _absolute(runs: list[Run], taxonomy: Taxonomy) -> str:
    names = ("base", *MODES)

    def mean(name: str, cell: tuple[str, str]) -> str:
        found = [row["mean"] for run in runs if (row := _cell((run["absolute"] or {}).get(name), cell))]
        return f"{sum(found) / len(found):.4g}" if found else NONE

    return table(["task", "dimension", *names], [[*cell, *(mean(name, cell) for name in names)] for cell in taxonomy.cells])


def _second_rounds(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        second = run.get("next_round")
        if not second:
            continue
        if "skipped" in second:
            lines.append([str(run["seed"]), *[NONE] * 5, second["skipped"].replace("|", "/")])
            continue
        mode = second["best_mode"]
        first = (run["policy"] or {}).get(run["best_mode"])
        means = ("mean_win_rate", "mean_lo", "mean_hi")
        pair = [interval(first, *means), interval((second["policy"] or {}).get(mode), *means)]
        against = (second["against_production"] or {}).get(mode)
        worst = min(against["cells"], key=lambda cell: cell["lo"]) if against and against["cells"] else None
        cell = f"{worst['task']}/{worst['dimension']} {interval(worst)}" if worst else NONE
        end = "refused: " + second["refused"].replace("|", "/") if second["refused"] else "released"
        lines.append([str(run["seed"]), second["commit"][:13], *pair, interval(against, *means), cell, end])
    if not lines:
        return "None was run."
    columns = ["first round over the base", "second round over the base", "second over the first's release", "worst cell there"]
    return table(["seed", "commit", *columns, "ended"], lines)


def _gates(runs: list[Run]) -> str:
    keys = list(dict.fromkeys((gate["artifact"], gate["name"]) for run in runs for gate in run["gates"]))
    lines = []
    for artifact, name in keys:
        line, threshold = [artifact, name], NONE
        for run in runs:
            gate = next((gate for gate in run["gates"] if (gate["artifact"], gate["name"]) == (artifact, name)), None)
            if gate is None:
                line.append(NONE)
                continue
            threshold = NONE if gate["threshold"] is None else f"{gate['threshold']:g}"
            measure = NONE if gate["measure"] is None else f"{gate['measure']:.3g}"
            needed = re.search(r"needed \d+", gate["description"])
            size = ", ".join([f"n {gate['n']}", *([needed[0]] if needed else [])]) if gate["n"] else ""
            line.append(measure + (f" ({size})" if size else "") + ("" if gate["passed"] else " **failed**"))
        lines.append([*line[:2], threshold, *line[2:]])
    return table(["artifact", "gate", "threshold", *(f"seed {run['seed']}" for run in runs)], lines)


def _plots(runs: list[Run], fits: list[dict[str, Any]]) -> dict[str, Figure]:
    """Name -> plot; those for which there are no figures are left out."""
    taxonomy = Taxonomy.load()
    labels = [f"{task} · {dimension.replace('_', ' ')}" for task, dimension in taxonomy.cells]

    def per_cell(
        cells_of: Callable[[Run], Sequence[dict[str, Any]] | None], name: str
    ) -> dict[str, list[tuple[float, float, float] | None]]:
        found = {}
        for run in runs:
            at = [_cell(cells_of(run), cell) for cell in taxonomy.cells]
            if any(at):
                found[f"seed {run['seed']}"] = [(row[name], row["lo"], row["hi"]) if row else None for row in at]
        return found

    plots = {}
    if judged := per_cell(lambda run: (sealed(run) or {}).get("cells"), "accuracy"):
        plots["judge"] = rates(labels, judged, x="agreement with the annotator, sealed pairs")
    for mode in MODES:
        if wins := per_cell(lambda run, mode=mode: (run["policy"] or {}).get(mode, {}).get("cells"), "win_rate"):
            plots[f"cells-{mode}"] = rates(labels, wins, x=f"{mode}: win rate over the base, by acceptance")
        panels = {
            f"seed {run['seed']}": {
                told: [(point["step"], *point[name]) for point in run["curves"][mode] if name in point] for told, name in NAMED.items()
            }
            for run in runs
            if mode in run["curves"]
        }
        if panels:
            plots[f"curves-{mode}"] = against_steps(panels, x=f"iterations, {mode}", y="preferred to the base")
    if fits:
        plots["label_curve"] = label_section.label_plot(fits)
    return plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(write_page())


if __name__ == "__main__":
    main()
