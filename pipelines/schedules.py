"""Schedules: retrain once a week. Switched on in the UI, or by `dagster schedule start weekly_retraining`."""

from __future__ import annotations

import dagster as dg

from pipelines.jobs import ALL_MODES, preferences_onward


@dg.schedule(
    job=preferences_onward,
    cron_schedule="0 3 * * 1",  # ours: Mondays at three, when the GPUs are idle
    execution_timezone="UTC",
    description="Retrain every Monday on the labels gathered so far.",
)
def weekly_retraining() -> dg.RunRequest:
    return dg.RunRequest(tags=ALL_MODES)
