"""Schedules: retrain once a week. Switched on in the UI, or by `dagster schedule start weekly_retraining`."""

from __future__ import annotations

import dagster as dg

from assets.curated_dataset import curated_dataset
from assets.preferences import preferences
from assets.settings import Settings
from pipelines.jobs import ALL_MODES, preferences_onward, whole_chain

WEEK_S = 7 * 24 * 3600


def weekly_retraining(settings: Settings) -> dg.ScheduleDefinition:
    """Retrain every Monday. Where the scripted annotator labels, each week seals other source images and labels anew.

    People's labels belong to the candidates they saw, so where people label the splits stay until `rotation` is raised in the preset
    and the new candidates are labelled.
    """
    scripted = preferences.config(**settings.stages.get(preferences.name, {})).scripted  # type: ignore[attr-defined]

    @dg.schedule(
        name="weekly_retraining",
        job=whole_chain if scripted else preferences_onward,
        cron_schedule="0 3 * * 1",  # ours: Mondays at three, when the GPUs are idle
        execution_timezone="UTC",
        description="Retrain every Monday, on other splits." if scripted else "Retrain every Monday on the labels gathered so far.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        week = int(context.scheduled_execution_time.timestamp()) // WEEK_S
        rotated = {"ops": {curated_dataset.name: {"config": {"rotation": week}}}}
        return dg.RunRequest(tags=ALL_MODES, run_config=rotated if scripted else {})

    return schedule
