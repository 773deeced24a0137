"""What is asked of every seed of a bench, and whether a run reached it: read from the stored figures, nothing measured here."""

from __future__ import annotations

from collections.abc import Callable
from operator import ge, gt, le
from typing import Any, Literal, NamedTuple

from models.taxonomy import Taxonomy
from ops.gate import GateConfig
from ops.policy_watch import hindsight

MODES = ("static", "ema")
NEAR = 0.05  # how far the chosen checkpoint may lie below the best in hindsight
NOT_WORSE = 0.45  # what the lower bound of a win rate must reach to be called not worse
Run = dict[str, Any]


class Target(NamedTuple):
    """One figure of a run and what is asked of it."""

    what: str
    bound: float
    measure: Callable[[Run], float | None]  # None where the run did not come so far
    how: Literal["at least", "above", "at most"] = "at least"

    @property
    def asked(self) -> str:
        return f"{self.how} {self.bound:g}"

    def met(self, run: Run) -> bool:
        """False too where there is no figure."""
        value = self.measure(run)
        return value is not None and {"at least": ge, "above": gt, "at most": le}[self.how](value, self.bound)


def sealed(run: Run) -> dict[str, Any] | None:
    """The judge's figures on sealed test pairs; a run that was refused before evaluation has validation pairs alone."""
    judge = run["judge"]
    return judge if judge and judge["split"] == "test" and judge["n"] else None


def _of_judge(read: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], float | None]:
    return lambda run: read(judge) if (judge := sealed(run)) else None


def _of_mode(mode: str, read: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        summary = (run["policy"] or {}).get(mode)
        return read(summary) if summary and summary["n"] else None

    return measure


def _lowest(rows: list[dict[str, Any]], name: str, of: int) -> float | None:
    """None as soon as one of the `of` tasks or cells has no row or no figure: the worst may be the one that was not measured."""
    values = [row[name] for row in rows]
    return min(values) if len(values) == of and None not in values else None


def _above_base(judge: dict[str, Any]) -> float | None:
    base = judge["base_mean_accuracy"]
    return None if base is None else judge["mean_accuracy"] - base


def _gap(mode: str) -> Callable[[Run], float | None]:
    return lambda run: found["gap"] if (found := hindsight((run["training"] or {}).get(mode))) else None


def _of_second_round(read: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], float | None]:
    """Of the second round's delivered mode against what the first one put into production."""

    def measure(run: Run) -> float | None:
        second = run.get("next_round") or {}
        against, mode = second.get("against_production"), second.get("best_mode")
        return read(against[mode]) if against and mode else None

    return measure


def targets() -> list[Target]:
    """All of them, judge first. Win rates are by the acceptance measures, with which nobody labelled."""
    taxonomy = Taxonomy.load()
    tasks, cells = len(taxonomy.active), len(taxonomy.cells)
    found = [
        Target("judge, sealed pairs: mean over cells", 0.80, _of_judge(lambda judge: judge["mean_accuracy"])),
        Target("judge, sealed pairs: worst cell", 0.70, _of_judge(lambda judge: _lowest(judge["cells"], "accuracy", cells))),
        Target("judge, sealed pairs: pairs in the smallest cell", 200, _of_judge(lambda judge: _lowest(judge["cells"], "n", cells))),
        Target("judge, sealed pairs: mean above the base judge's", 0.05, _of_judge(_above_base)),
        Target("judge, sealed pairs: order consistency", 0.85, _of_judge(lambda judge: judge["order_consistency"])),
    ]
    for mode in MODES:
        found += [
            Target(
                f"judge, {mode} against base: mean over cells",
                0.80,
                _of_mode(mode, lambda s: (s["judge_on_edits"] or {}).get("mean_accuracy")),
            ),
            Target(
                f"judge, {mode} against base: worst cell",
                0.70,
                _of_mode(mode, lambda s: _lowest((s["judge_on_edits"] or {"cells": []})["cells"], "accuracy", cells)),
            ),
            Target(
                f"judge, {mode} against base: pairs in the smallest cell",
                200,
                _of_mode(mode, lambda s: _lowest((s["judge_on_edits"] or {"cells": []})["cells"], "n", cells)),
            ),
        ]
    limits = GateConfig()
    for mode in MODES:
        found += [
            Target(f"{mode}: mean win rate over tasks", 0.75, _of_mode(mode, lambda s: s["mean_win_rate"])),
            Target(
                f"{mode}: win rate in removal",
                0.80,
                _of_mode(mode, lambda s: _lowest([t for t in s["tasks"] if t["task"] == "remove"], "win_rate", 1)),
            ),
            Target(f"{mode}: lower bound of the worst task", 0.50, _of_mode(mode, lambda s: _lowest(s["tasks"], "lo", tasks)), how="above"),
            Target(f"{mode}: lower bound of the worst cell", NOT_WORSE, _of_mode(mode, lambda s: _lowest(s["cells"], "lo", cells))),
            Target(
                f"{mode}: PSNR lost outside the mask, dB",
                limits.max_psnr_drop,
                _of_mode(mode, lambda s: s["base_preservation_psnr"] - s["preservation_psnr"]),
                how="at most",
            ),
            Target(
                f"{mode}: likeness lost outside the mask",
                limits.max_similarity_drop,
                _of_mode(mode, lambda s: s["base_outside_similarity"] - s["outside_similarity"]),
                how="at most",
            ),
            Target(f"{mode}: chosen checkpoint below the best in hindsight by", NEAR, _gap(mode), how="at most"),
        ]
    return [
        *found,
        Target("second round over the first's release: lower bound of the mean", NOT_WORSE, _of_second_round(lambda s: s["mean_lo"])),
        Target(
            "second round over the first's release: lower bound of the worst task",
            NOT_WORSE,
            _of_second_round(lambda s: _lowest(s["tasks"], "lo", tasks)),
        ),
        Target(
            "second round over the first's release: lower bound of the worst cell",
            NOT_WORSE,
            _of_second_round(lambda s: _lowest(s["cells"], "lo", cells)),
        ),
    ]
