"""docs/ablations.md and its two plots, written whole from benchmarks/results/ablations.json: no figure is typed by hand.

write_page(json.loads(Path("benchmarks/results/ablations.json").read_text()), Path("docs/ablations.md"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.ablation_arms import ARMS, DEFAULTS
from benchmarks.markdown import rate, sampling, table
from benchmarks.taste import DIMENSION
from ops.pictures import rates

Found = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> figures
HEADLINE = {"judge": "mean_accuracy", "policy": "mean_win_rate", "taste": "more_vivid"}
three = partial(rate, digits=3)
ROOM = 0.02  # ours: empty margin of the plots

LIMITS = """\
**What this can and cannot show.** The world is the preset's: small pictures, networks of a few megabytes, a scripted annotator. An arm that
helps here need not help FLUX Fill and people. A few seeds ({seeds} here) give the size of a difference, not its proof: one that is not
clearly larger than its spread over seeds says nothing, and with {arms} arms some will stand out by luck; nothing is corrected for that.
Every arm but those of a perfect judge and of a taste changes one setting, and nothing was tuned for any, while the preset's own were
chosen on other scenes ([evidence.md](evidence.md#what-the-figures-have-seen)), so the defaults are favoured. The base judge has been
trained on pairs and on the shipped query, which favours them once more, and the candidates hold one-step predictions of the stop steps
that the preset names for them only. No second judge is fitted: all labels go to the judge that is measured, and of every policy the last
checkpoint is delivered where the chain would choose one. The scenes are others than those of `make bench`; the few photographs, which
count in the judge's figures and not in the win rates, are the same for all seeds."""
JUDGES = """\
Agreement with the annotator, who never errs there, on the pairs of the sealed split, each asked in both orders; mean over cells of task and
dimension. *One-step pairs*: both candidates are predictions from a stop step, as reinforcement learning shows them. Order consistency is
the share of pairs whose two orders name one picture; a pointwise judge has no order to err in. n counts pairs over all seeds."""
POLICIES = """\
Win rate over the base from the same noise, ties half, by the acceptance measures on the sealed split's scenes; mean over tasks of means
over dimensions, with 95% intervals drawn over scenes for each seed. Beside it the same by the measures the annotator ranks with and by the
seed's `judge/default`. n counts edits over all seeds. All arms but those that name another judge are rewarded by `judge/default`,
in the cells it can judge."""

TASTE = f"""\
Does a policy do what labels ask for? The answers on {DIMENSION} are replaced by a taste: which candidate is the more, or the less, vivid in
what was made (mean of `max - min` of RGB). All settings and all other labels are those of `policy/static`; the judge is fitted anew, so its
other answers and the cells that it may reward can differ. *More vivid*: share of the edits that are more vivid than the base's from the
same noise, ties half, of the tasks with {DIMENSION}, mean over tasks, with 95% intervals drawn over scenes for each seed. Both tastes
take the place of the shipped reward for detail, so what the labels did is the difference between the two, not that from one half.
*Judge*: accuracy on the sealed pairs of that dimension by its own labels, in brackets the base judge's: how far it leans that way unasked
(.5: not at all; of `muted` it is the mirror of `vivid`). *Rewarded*: tasks in which the judge may reward that dimension, all seeds
together. *Accepted*: win rate as above, {DIMENSION} counted as ever. The taste is counted by the formula that labelled: that labels are
followed is asked here, not whether edits get better by them."""


def write_page(record: dict[str, Any], page: Path) -> None:
    """Write the page and, in a folder of its name beside it, the plots."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    found, seeds = _found(record), record["seeds"]
    parts = [_head(record)]
    kinds = {
        "judge": (_judges, "accuracy on the test pairs"),
        "policy": (_policies, "win rate over the base"),
        "taste": (_tastes, "edits more vivid than the base's"),
    }
    for kind, (section, x) in kinds.items():
        if _of(found, kind):
            _plot(found, kind, f"{x}: mean, lowest and highest seed", pictures / f"{kind}.png")
            parts.append(section(found, seeds, f"{pictures.name}/{kind}.png"))
    if failed := [f"- `{row['arm']}`, seed {row['seed']}: {row['error']}" for row in record["rows"] if "error" in row]:
        parts += ["## Arms that could not be run", "\n".join(failed)]
    page.write_text("\n\n".join(parts) + "\n")


def _found(record: dict[str, Any]) -> Found:
    """What was measured, arms in their order."""
    found: Found = {arm: {row["seed"]: row["figures"] for row in record["rows"] if row["arm"] == arm and "figures" in row} for arm in ARMS}
    return {arm: by_seed for arm, by_seed in found.items() if by_seed}


def _head(record: dict[str, Any]) -> str:
    machine, commits = record["machine"], ", ".join(commit[:12] for commit in record["commits"])
    done = len({row["arm"] for row in record["rows"]})
    about = (
        f"One setting changed at a time (but for a perfect judge and another taste), the rest as the preset `{record['preset']['preset']}` "
        f"has it: {done} of {len(ARMS)} arms. Written by `{record['command']}` from `benchmarks/results/ablations.json`; commit {commits}; "
        f"{machine['cores']} cores, {machine['processor']}, Python {machine['python']}. Edits: {sampling(record['preset'])}. "
        "Numbers of labels and annotators' errors: [results](results.md)."
    )
    return "\n\n".join(["# Ablations", about, LIMITS.format(seeds=len(record["seeds"]), arms=len(ARMS))])


def _mean(by_seed: dict[int, dict[str, Any]], get: Callable[[dict[str, Any]], float | None]) -> float | None:
    values = [value for figures in by_seed.values() if (value := get(figures)) is not None]
    return fmean(values) if values else None


def _difference(found: Found, arm: str) -> str:
    """Mean over seeds of the headline minus the default's of the same seed, with the lowest and the highest."""
    kind = arm.split("/")[0]
    key, default = HEADLINE[kind], found.get(DEFAULTS[kind], {})
    pairs = [(figures[key], default[seed][key]) for seed, figures in found[arm].items() if seed in default]
    steps = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if arm == DEFAULTS[kind] or not steps:
        return "–"
    return f"{three(fmean(steps))} ({three(min(steps))} to {three(max(steps))})"


def _interval(figures: dict[str, Any] | None, names: Sequence[str] = ("mean_win_rate", "mean_lo", "mean_hi")) -> str:
    if not figures:
        return "–"
    value, low, high = (three(figures[name]) for name in names)
    return f"{value} ({low} to {high})"


def _section(title: str, about: str, arms: Sequence[str], *parts: str) -> str:
    """What is measured, what each arm is, then the tables and plots."""
    explained = "\n".join(f"- `{name}`: {ARMS[name].says}" for name in arms)
    return "\n\n".join([f"## {title}", about, explained, *parts])


def _of(found: Found, kind: str) -> list[str]:
    return [arm for arm in found if arm.startswith(kind)]


def _judges(found: Found, seeds: Sequence[int], picture: str) -> str:
    arms = _of(found, "judge")
    rows = [
        [
            f"`{arm}`",
            three(_mean(found[arm], lambda f: f["mean_accuracy"])),
            *(three(found[arm].get(seed, {}).get("mean_accuracy")) for seed in seeds),
            _difference(found, arm),
            three(_mean(found[arm], lambda f: f["order_consistency"])),
            three(_mean(found[arm], lambda f: f["one_step"])),
            f"{sum(f['n'] for f in found[arm].values())} ({sum(f['n_one_step'] for f in found[arm].values())})",
        ]
        for arm in arms
    ]
    header = [
        "arm",
        "mean",
        *(f"seed {seed}" for seed in seeds),
        "against the default",
        "order consistency",
        "one-step pairs",
        "n (one-step)",
    ]
    plot = f"![Accuracy of each judge]({picture})"
    return _section("The judge", JUDGES, arms, table(header, rows), plot, "Per cell, mean over seeds:", _cells(found, arms, "accuracy"))


def _policies(found: Found, seeds: Sequence[int], picture: str) -> str:
    arms = _of(found, "policy")

    def decibels(name: str, arm: str) -> str:
        value = _mean(found[arm], lambda f: f[name])
        return "–" if value is None else f"{value:.1f}"

    rows = [
        [
            f"`{arm}`",
            three(_mean(found[arm], lambda f: f["mean_win_rate"])),
            *(_interval(found[arm].get(seed)) for seed in seeds),
            _difference(found, arm),
            three(_mean(found[arm], lambda f: f["confirming_mean_win_rate"])),
            three(_mean(found[arm], lambda f: f["judge_mean_win_rate"])),
            f"{decibels('preservation_psnr', arm)} ({decibels('base_preservation_psnr', arm)})",
            str(sum(f["n"] for f in found[arm].values())),
        ]
        for arm in arms
    ]
    seeded = [f"seed {seed}" for seed in seeds]
    header = ["arm", "mean", *seeded, "against the default", "annotator's measures", "judge", "PSNR outside, dB (base)", "n"]
    per_task = "Per task, mean over seeds:", _tasks(found, arms, "win_rate")
    per_cell = "Per cell, mean over seeds:", _cells(found, arms, "win_rate")
    plot = f"![Win rate of each policy]({picture})"
    return _section("The policy", POLICIES, arms, table(header, rows), plot, *per_task, *per_cell)


def _tastes(found: Found, seeds: Sequence[int], picture: str) -> str:
    arms = _of(found, "taste")

    def right(arm: str, judge: str) -> str:
        return three(_mean(found[arm], lambda f: f[judge]["mean_accuracy"]))

    def rewarded(arm: str) -> str:
        may = [DIMENSION in f["rewarded"].get(row["task"], ()) for f in found[arm].values() for row in f["tasks"]]
        return f"{sum(may)} of {len(may)}"

    rows = [
        [
            f"`{arm}`",
            three(_mean(found[arm], lambda f: f["more_vivid"])),
            *(_interval(found[arm].get(seed), ("more_vivid", "lo", "hi")) for seed in seeds),
            _difference(found, arm),
            f"{right(arm, 'judge')} ({right(arm, 'base_judge')})",
            rewarded(arm),
            three(_mean(found[arm], lambda f: f["accepted"]["mean_win_rate"])),
            str(sum(f["n"] for f in found[arm].values())),
        ]
        for arm in arms
    ]
    seeded = [f"seed {seed}" for seed in seeds]
    header = ["arm", "more vivid", *seeded, f"less `{DEFAULTS['taste']}`", "judge (base judge)", "rewarded", "accepted", "n"]
    per_task = "More vivid per task, mean over seeds:", _tasks(found, arms, "more_vivid")
    plot = f"![Share of edits more vivid than the base's]({picture})"
    return _section("Another taste", TASTE, arms, table(header, rows), plot, *per_task)


def _tasks(found: Found, arms: Sequence[str], key: str) -> str:
    names = list(dict.fromkeys(row["task"] for arm in arms for figures in found[arm].values() for row in figures["tasks"]))

    def won(arm: str, task: str) -> str:
        return rate(_mean(found[arm], lambda f: next((row[key] for row in f["tasks"] if row["task"] == task), None)))

    return table(["arm", *names], [[f"`{arm}`", *(won(arm, task) for task in names)] for arm in arms])


def _cells(found: Found, arms: Sequence[str], key: str) -> str:
    """One line per cell, one column per arm."""
    cells = {(row["task"], row["dimension"]): 0 for arm in arms for figures in found[arm].values() for row in figures["cells"]}

    def at(figures: dict[str, Any], cell: tuple[str, str], name: str) -> Any:
        return next((row[name] for row in figures["cells"] if (row["task"], row["dimension"]) == cell), None)

    def line(cell: tuple[str, str]) -> list[str]:
        count = max(sum(at(figures, cell, "n") or 0 for figures in found[arm].values()) for arm in arms)
        return [" · ".join(cell), str(count), *(rate(_mean(found[arm], lambda f: at(f, cell, key))) for arm in arms)]

    return table(["cell", "n", *(f"`{arm.split('/')[1]}`" for arm in arms)], [line(cell) for cell in cells])


def _plot(found: Found, kind: str, x: str, path: Path) -> None:
    spread = {}
    for arm in _of(found, kind):
        values = [value for figures in found[arm].values() if (value := figures[HEADLINE[kind]]) is not None]
        if values:
            spread[arm.split("/")[1].replace("_", " ")] = (fmean(values), min(values), max(values))
    if not spread:  # nothing but photographs: there is no win rate
        return
    limits = min(low for _, low, _ in spread.values()) - ROOM, max(high for _, _, high in spread.values()) + ROOM
    default = spread.get(DEFAULTS[kind].split("/")[1])
    figure = rates(list(spread), {kind: list(spread.values())}, x=x, reference=default and default[0], limits=limits)
    figure.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": None})
