"""What each artifact is measured on before the chain may go on with it.

    gates = check("onnx", store.get(ref), GateConfig())

A check reads the artifact's own folder: rows and files where they tell more than `metrics.json`, else the metrics. Every gate
fails closed: a figure that is absent, not a number or infinite does not pass.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import ConfigError, ExportError, OneRewardError, UnknownVersion
from models.records import SPLITS, Condition, read_rows
from ops.curate import leaked_sources
from ops.export_onnx import FILE, open_session
from ops.folders import read_metrics
from ops.gate import Gate, GateConfig
from ops.gate_estimates import largest_sample, sample, with_estimates
from ops.gate_figures import Metrics, broken, cell_name, either, lowest, minus, number, rows, section
from ops.lineage import POLICY_PREFIX
from ops.policy_health import stored_change
from ops.probe import CHECKPOINTS, hacked, read_checkpoints
from ops.second_opinion import SECOND_OPINIONS
from ops.statistics import holm
from ops.win_rates import BASE, ITEMS, PAIRS

SEALED = "test"  # the split that nothing but the evaluation opens
_SHOWN = 3  # ours: findings that a gate names
HARM_MARGIN = 0.10  # ours: the loss in a cell's win rate for whose discovery the sample size is printed
_NON_INFERIORITY = 0.45  # ours: the bound whose sample size is printed where none is in force


def check_curated(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """No source image in two splits, counted from the rows and the pixels themselves; enough conditions in each split."""
    conditions = read_rows(folder / "conditions.jsonl", Condition)
    splits: dict[str, set[str]] = {}
    for row in conditions:
        splits.setdefault(row.source_id, set()).add(row.split)
    leaked = sorted({source for source, found in splits.items() if len(found) > 1} | set(leaked_sources(folder)))
    counts = Counter(row.split for row in conditions)
    smallest = min(SPLITS, key=lambda split: counts[split])
    shown = f": {', '.join(leaked[:3])}" if leaked else ""
    return [
        _at_most("split_leak", float(len(leaked)), 0, f"source images in more than one split{shown}"),
        _at_least("split_size", float(counts[smallest]), config.min_per_split, f"conditions in the smallest split, {smallest}"),
    ]


def check_pairs(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """Few enough ties in every cell; the place in which a candidate was shown does not tell the winner.

    A cell of which the data holds no condition is not asked for.
    """
    cells = [cell for cell in rows(metrics, "cells") if number(cell, "conditions") != 0]
    shares = {f"{cell.get('task')}, {cell.get('dimension')}": number(cell, "dropped_share") for cell in cells}
    worst = max(shares, key=lambda cell: either(shares[cell], math.inf), default="no cell")
    unlabelled = worst in shares and shares[worst] is None
    remedy = "; nobody has labelled its conditions: import labels for them, or leave the task out of the data" if unlabelled else ""
    weights = [sum(either(number(cell, f"n_{split}"), 0.0) for split in SPLITS) for cell in cells]
    firsts = [number(cell, "first_wins_share") for cell in cells]
    held = [(weight, first) for weight, first in zip(weights, firsts, strict=True) if weight]
    deviation = None
    if held and all(first is not None for _, first in held):
        deviation = abs(sum(weight * either(first, math.nan) for weight, first in held) / sum(weight for weight, _ in held) - 0.5)
    return [
        _at_most("dropped_share", shares.get(worst), config.max_dropped_share, f"share of ties in the worst cell: {worst}{remedy}"),
        _at_most("class_balance", deviation, config.max_first_share_deviation, "how far the first shown wins more or less than half"),
    ]


def check_reward_model(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The judge agrees with held-out labels, and with itself when the two images change places."""
    return [
        _finite("judge_finite", metrics),
        _at_least(
            "judge_accuracy",
            number(metrics, "mean_accuracy"),
            config.min_judge_accuracy,
            "mean over cells, validation pairs, which chose the checkpoint too",
        ),
        _at_least("judge_order", number(metrics, "order_consistency"), config.min_order_consistency, "both orders alike, mean over cells"),
    ]


def check_policy(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """Health only: finite, moved, preserved, its judge not hacked. Whether the policy is better is the evaluation's to say.

    `check` has put what the stored weights say in the place of what training said of them; preservation stays as training measured it.
    """
    finite = _finite("policy_finite", metrics)
    if metrics.get("finite") is not True:
        finite = dataclasses.replace(finite, measure=either(finite.measure, 0.0) + 1, passed=False)
    return [
        finite,
        _above("policy_moved", number(metrics, "relative_change"), config.min_policy_change, "relative change of the weights"),
        _preserved("policy_preserved", metrics, config),
        _no_hacking(folder, metrics, config),
    ]


def _no_hacking(folder: Path, metrics: Metrics, config: GateConfig) -> Gate:
    """The judge did not come to like the policy better while an independent metric came to like it less."""
    places = "places (cell, task, dimension, all) where the judge rose and an independent metric fell"
    told = f"{places}, at most {config.family_error:.0%} wrongly (Holm)"
    try:
        found = hacked(read_checkpoints(folder / CHECKPOINTS), level=config.family_error, delivered=metrics.get("best_step"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _at_most("hacking", None, 0, f"{told}; not to be told from the records: {error!r}")
    shown = "; ".join(each.told for each in found[:_SHOWN])
    return _at_most("hacking", float(len({each.place for each in found})), 0, f"{told}{': ' if found else ''}{shown}")


def check_evaluation(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The better mode beats the base by the evidence's measures, on no task badly, without touching what it should keep.

    A task of which no condition was tested is not asked for; the metrics name it under `not_evaluated`.
    """
    mode = metrics.get("best_mode")
    policy, rival = (section(section(metrics, name), mode) for name in ("policy", "against_production"))
    tested = [row for row in rows(policy, "tasks") if (number(row, "n"), number(row, "n_without_truth")) != (0, 0)]
    cells = rows(policy, "cells")
    known = [row for row in tested if number(row, "n")]
    worst = lowest(known)
    judge = section(metrics, "judge")
    of_mode = f"of the better mode, {mode}"
    size = sample(policy, "mean_se", config.min_win_rate - config.min_win_rate_lo)
    return [
        _known_truth(tested, metrics.get("evidence"), config),
        _sealed(metrics),
        _at_least("win_rate", number(policy, "mean_win_rate"), config.min_win_rate, f"mean win rate over the base {of_mode}"),
        _above("win_rate_lo", number(policy, "mean_lo"), config.min_win_rate_lo, f"lower bound of the mean win rate {of_mode}{size}"),
        _at_least(
            "task_lo",
            number(worst, "lo"),
            config.min_task_lo,
            f"lower bound on the worst task {of_mode}: {worst.get('task', 'no task')}"
            f"{largest_sample(known, 0.5 - config.min_task_lo, all_pass=True)}",
        ),
        _no_cell_worse("cell_lo", cells, config, f"against the base {of_mode}"),
        _preserved("evaluation_preserved", policy, config),
        _at_most(
            "evaluation_looks_kept",
            minus(number(policy, "base_outside_similarity"), number(policy, "outside_similarity")),
            config.max_similarity_drop,
            "below the base's likeness to the source outside the mask, raw output",
        ),
        _no_cell_hacked(cells, rows(rival, "cells"), config),
        _no_fact_lost(policy, rival, config),
        _at_least(
            "sealed_judge_accuracy",
            number(judge, "mean_accuracy"),
            config.min_judge_accuracy,
            f"mean over cells, {judge.get('n', 0)} sealed test pairs",
        ),
        _at_least(
            "confirming_lo",
            number(policy, "confirming_mean_lo"),
            config.min_confirming_lo,
            f"lower bound of the mean win rate by the measures that have to confirm it {of_mode}"
            f"{sample(policy, 'confirming_mean_se', 0.5 - config.min_confirming_lo)}",
        ),
        _seconded(metrics, mode, config),
        *_not_below_production(metrics, rival, config),
    ]


def _sealed(metrics: Metrics) -> Gate:
    """Was everything measured on the test split, and where there was a choice, was it made on another?

    Counts the settings that name another split, and the records whose condition lies in another one (`check` has counted these).
    """
    judge, elsewhere = metrics.get("judge"), number(metrics, "elsewhere")
    splits = {"measured": metrics.get("split")}
    if isinstance(judge, dict):
        splits["judge asked"] = judge.get("split")
    wrong = [f"{what} on {split}" for what, split in splits.items() if split != SEALED]
    if len(section(metrics, "policy")) > 1 and metrics.get("chosen_on") not in set(SPLITS) - {SEALED}:
        wrong.append(f"reference mode chosen on {metrics.get('chosen_on')}")
    count = None if elsewhere is None or not splits["measured"] else len(wrong) + elsewhere
    if elsewhere:
        wrong.append(f"{elsewhere:.0f} records of conditions that the curated data has in another split")
    told = f"not on the sealed split as they should be{': ' if wrong else ''}{', '.join(wrong)}"
    return _at_most("sealed_split", count, 0, told)


def _elsewhere(folder: Path, metrics: Metrics, curated: Path | None) -> float | None:
    """Records of an evaluation whose condition the curated data has in another split than they say, or not at all, and pairs of any but the
    sealed one. None where that cannot be told: a file is not there, or no edit is on record."""
    if curated is None:
        return None
    read = [ITEMS, *([PAIRS] if "judge" in metrics else []), *([SECOND_OPINIONS] if "second_judge" in metrics else [])]
    try:
        splits = {row.id: row.split for row in read_rows(curated / "conditions.jsonl", Condition)}
        lines = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in read}
        found = {name: [(splits.get(row["condition_id"]), row["split"]) for row in map(json.loads, lines[name])] for name in read}
    except (OSError, ValueError, KeyError, TypeError, OneRewardError):
        return None
    if not all(found[name] for name in read if name != PAIRS or number(section(metrics, "judge"), "n")):
        return None
    return float(sum(true != said or (name == PAIRS and said != SEALED) for name in read for true, said in found[name]))


def _known_truth(tested: list[Metrics], evidence: Any, config: GateConfig) -> Gate:
    """Were wins counted by what the preset asks for, on every tested task? `tested` are the rows of the tasks with test conditions."""
    uncounted = [str(row.get("task")) for row in tested if not number(row, "n")]
    count = float(len(uncounted)) if tested else None
    if evidence == "blind" and not config.require_ground_truth:
        told = "not asked under `evidence: blind`, where measures that need no target count; tested tasks without any of them"
        return Gate("ground_truth", count, None, count == 0, f"{told}{': ' if uncounted else ''}{', '.join(uncounted)}")
    if evidence != "ground_truth":
        told = "wins counted against known targets; this evaluation counted by other measures, which the preset in force does not accept"
        return Gate("ground_truth", None, 0, False, told)
    told = "tested tasks without a condition whose perfect edit is known"
    if uncounted:
        told += (
            f": {', '.join(uncounted)}. Only procedural scenes have one: run with scenes in the data (section source_images, `path` empty"
            " and `n_scenes` above 0), or let measures count that need no target (section evaluation, `evidence: blind`)"
        )
    return _at_most("ground_truth", count, 0, told)


def _seconded(metrics: Metrics, mode: Any, config: GateConfig) -> Gate:
    """No step back by an edit judge that was not fitted here, where the preset names one."""
    if metrics.get("policy") and "second_judge" not in metrics and not config.require_second_judge:
        return _at_most("second_judge_lo", 0, 0, "second judges asked: the preset names none")
    found = section(section(section(metrics, "second_judge"), BASE), mode)
    size = sample(found, "se", 0.5 - config.min_confirming_lo)
    told = f"lower bound of the mean win rate over the base by the second judge that the preset names{size}"
    return _at_least("second_judge_lo", number(found, "lo"), config.min_confirming_lo, told)


def _not_below_production(metrics: Metrics, rival: Metrics, config: GateConfig) -> list[Gate]:
    if metrics.get("policy") and "against_production" not in metrics:
        nothing = "rivals in production: there is nothing to fall below yet"
        return [_at_most(name, 0, 0, nothing) for name in ("not_below_production", "lost_tasks", "production_cell_lo")]
    told = f"lower bound of the mean win rate against production{sample(rival, 'mean_se', 0.5 - config.min_production_lo)}"
    return [
        _at_least("not_below_production", number(rival, "mean_lo"), config.min_production_lo, told),
        _no_task_lost([row for row in rows(rival, "tasks") if number(row, "n") != 0], config),
        _no_cell_worse("production_cell_lo", rows(rival, "cells"), config, "against production"),
    ]


def _no_task_lost(tasks: list[Metrics], config: GateConfig) -> Gate:
    """Harm: no task is proven worse than production's, over all of them (Holm). Figures that are absent or not finite count as lost."""
    lost = holm({str(task.get("task")): either(number(task, "p_worse"), 0.0) for task in tasks}, config.family_error)
    told = f"tasks proven worse than production's, at most {config.family_error:.0%} wrongly so over {len(tasks)} tasks (Holm)"
    return _at_most("lost_tasks", len(lost) if tasks else None, 0, f"{told}{': ' if lost else ''}{', '.join(lost)}")


def _no_cell_worse(name: str, cells: list[Metrics], config: GateConfig, told: str) -> Gate:
    """Non-inferiority. The claim is "no cell is worse": each has to show it, and no correction is due (docs/statistics.md)."""
    worst = lowest(cells)
    bound, asked = number(worst, "lo"), config.min_cell_lo
    size = largest_sample(cells, 0.5 - (asked or _NON_INFERIORITY), all_pass=True)
    told = f"lower bound on the worst cell {told}: {cell_name(worst)}{size}"
    if asked is None:
        return Gate(name, bound, None, bound is not None, f"measured, not gated: {told}")
    return _at_least(name, bound, asked, told)


def _no_cell_hacked(cells: list[Metrics], rival_cells: list[Metrics], config: GateConfig) -> Gate:
    """Cells where the judge says better and the measures prove worse, than the base or, in `rival_cells`, than production.

    Any of them fails, so chance finds are corrected for over all of both: Holm. A cell whose `judge_win_rate` is null has a dimension the
    judge does not know, and cannot be hacked. Figures that are absent or not finite count as hacked.
    """
    named = {cell_name(cell): cell for cell in cells} | {f"{cell_name(cell)} against production": cell for cell in rival_cells}
    asked = {name: cell for name, cell in named.items() if cell.get("judge_win_rate", math.nan) is not None}
    worse, won = {}, set()
    for name, cell in asked.items():
        judged, p_value = number(cell, "judge_win_rate"), number(cell, "p_worse")
        failed = judged is None or p_value is None
        worse[name] = 0.0 if failed else either(p_value, 0.0)
        if failed or either(judged, 1.0) > 0.5:
            won.add(name)
    hacked = [name for name in holm(worse, config.family_error) if name in won]
    alone = sorted(name for name, p in worse.items() if name in won and p < config.family_error / 2 and name not in hacked)
    told = f"cells won by the judge and lost by the measures, at most {config.family_error:.0%} wrongly so over {len(asked)} cells (Holm)"
    told += f"{': ' if hacked else ''}{', '.join(hacked)}"
    told += f"; lost if asked alone: {', '.join(alone)}" if alone else ""
    told += largest_sample(list(asked.values()), HARM_MARGIN, alpha=config.family_error / max(1, len(asked)))
    return _at_most("hacked_cells", len(hacked) if cells else None, config.max_hacked_cells, told)


def _no_fact_lost(policy: Metrics, rival: Metrics, config: GateConfig) -> Gate:
    """Harm: nothing that scenes' requests ask for is proven to be seen less often than in the base's edits or, in `rival`'s rows, in
    production's, over all of both (Holm). Figures that are absent or not finite count as lost; without scenes nothing is asked."""
    against = {"": policy, " against production": rival} if rival else {"": policy}
    found = {f"{row.get('task')}/{row.get('fact')}{name}": row for name, table in against.items() for row in rows(table, "facts")}
    lost = holm({name: either(number(row, "p_worse"), 0.0) for name, row in found.items()}, config.family_error)
    told = f"facts proven to be seen less often than in the base's edits or production's, at most {config.family_error:.0%} wrongly so "
    told += f"over {len(found)} facts (Holm){': ' if lost else ''}{', '.join(lost)}"
    known = all(isinstance(table.get("facts"), list) for table in against.values())
    return _at_most("lost_facts", len(lost) if known else None, 0, told)


def check_onnx(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The file itself passes ONNX's checker and loads in ONNX Runtime; its error was measured and is small."""
    told = "the file passes ONNX's checker and loads in ONNX Runtime"
    try:
        open_session(folder / FILE)
        valid = 1.0
    except ExportError as refused:
        valid, told = 0.0, f"{told}: {refused.what}"
    error = number(metrics, "relative_error")
    return [
        _at_least("onnx_valid", valid, 1, told),
        _at_most("onnx_error", error, config.max_onnx_error, "relative error against torch, worst of the shapes"),
    ]


def check_engine(folder: Path, metrics: Metrics, config: GateConfig) -> list[Gate]:
    """The engine was built, and for named architectures; whether it ever ran is recorded."""
    size = sum(path.stat().st_size for path in folder.glob("*.engine"))
    architectures = metrics.get("architectures")
    named = float(len(architectures)) if isinstance(architectures, list) else None
    verified = metrics.get("verified")
    measure = float(verified) if isinstance(verified, bool) else None
    asked = 1.0 if config.require_verified_engine else None
    ran = measure is not None and (asked is None or measure >= asked)
    return [
        _at_least("engine_built", float(size), 1, "bytes of the engine"),
        _at_least("engine_architectures", named, 1, "architectures it was built for"),
        Gate("engine_verified", measure, asked, ran, "1 when the engine was executed on a GPU, 0 when it is unverified"),
    ]


# Artifact -> its check, in the chain's order.
CHECKS: dict[str, Callable[[Path, Metrics, GateConfig], list[Gate]]] = {
    "curated_dataset": check_curated,
    "preference_pairs": check_pairs,
    "reward_model": check_reward_model,
    "policy-static": check_policy,
    "policy-ema": check_policy,
    "evaluation": check_evaluation,
    "onnx": check_onnx,
    "engine": check_engine,
}


def check(name: str, folder: Path, config: GateConfig, base: Path | None = None, curated: Path | None = None) -> list[Gate]:
    """The gates of an artifact by name. A folder without readable metrics fails those that need them.

    `base` is the pipeline's folder that a policy started from; its stored weights must have moved, and without it they have not.
    `curated` is the data of an evaluation; without it nobody knows what was sealed. Raises ConfigError for an artifact that has no gates.
    """
    if name not in CHECKS:
        raise ConfigError(f"{name} has no gates.", f"Those with gates are {', '.join(CHECKS)}.")
    try:
        metrics = read_metrics(folder)
    except (UnknownVersion, ValueError):
        metrics = {}
    if name.startswith(POLICY_PREFIX):
        change = stored_change(base, folder) if base else math.nan
        metrics = {**metrics, "relative_change": change, "finite": metrics.get("finite") is True and math.isfinite(change)}
    if name == "evaluation":
        metrics = {**metrics, "elsewhere": _elsewhere(folder, metrics, curated)}
    return with_estimates(CHECKS[name](folder, metrics, config), metrics)


# Verdicts


def _at_least(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    return Gate(name, measure, threshold, measure is not None and measure >= threshold, f"at least: {description}")


def _above(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    return Gate(name, measure, threshold, measure is not None and measure > threshold, f"above: {description}")


def _at_most(name: str, measure: float | None, threshold: float, description: str) -> Gate:
    measure = measure if measure is not None and math.isfinite(measure) else None
    return Gate(name, measure, threshold, measure is not None and measure <= threshold, f"at most: {description}")


def _finite(name: str, metrics: Metrics) -> Gate:
    return _at_most(name, float(broken(metrics)) if metrics else None, 0, "figures that are not finite")


def _preserved(name: str, figures: Metrics, config: GateConfig) -> Gate:
    drop = minus(number(figures, "base_preservation_psnr"), number(figures, "preservation_psnr"))
    return _at_most(name, drop, config.max_psnr_drop, "dB below the base outside the mask, raw output")
