"""Sensors: enough new human labels start retraining from `preferences` on."""

from __future__ import annotations

import dagster as dg

from infra.labels import LabelStore
from infra.workspace import Workspace
from pipelines.jobs import ALL_MODES, preferences_onward

HUMAN = ("import",)


def enough_new_labels(after: int) -> dg.SensorDefinition:
    """A sensor that asks for `preferences_onward` once per `after` new imported labels.

    The cursor is the newest label's id at the last request and the run key the newest one now, so a tick that is evaluated
    twice starts one run.
    """

    @dg.sensor(
        name="enough_new_labels",
        job=preferences_onward,
        minimum_interval_seconds=60,
        description=f"Retrain after {after} new labels. The scripted annotator's do not count: the chain itself writes them.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        labels = LabelStore(Workspace.from_env().labels_url)
        new = labels.count(int(context.cursor or 0), sources=HUMAN)
        if new < after:
            return dg.SkipReason(f"{new} new labels, {after} are needed")
        newest = labels.last_id(sources=HUMAN)
        context.update_cursor(str(newest))
        return dg.RunRequest(run_key=f"labels-{newest}", tags=ALL_MODES)

    return sensor
