"""Runs whose process is gone: killed by the kernel, a power cut, `kill -9`.

Dagster goes on calling them started. They keep the pool's only slot and the queue's only place, so that the next run would wait
for them for ever.
"""

from __future__ import annotations

import shutil

import dagster as dg
import psutil

from infra.workspace import Workspace

UNDER_WAY = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
GONE = "its process is gone; finished stages are kept and the next run goes on from there"


def end_dead_runs(instance: dg.DagsterInstance, workspace: Workspace) -> list[str]:
    """Mark the dead as failed and free what they held; ids of the runs that are alive, the oldest first.

    Where none is alive, the drafts in the workspace are nobody's and are removed.
    """
    alive = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=UNDER_WAY), ascending=True):
        run = record.dagster_run
        if _alive(instance, run.run_id):
            alive.append(run.run_id)
        else:
            instance.report_run_failed(run, GONE)
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if not alive:
        shutil.rmtree(workspace.tmp, ignore_errors=True)
    return alive


def _alive(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether the process that announced itself in the run's log still runs, and is not a later one of the same number."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        if entry.dagster_event and (pid := entry.dagster_event.engine_event_data.metadata.get("pid")):
            try:
                process = psutil.Process(int(str(pid.value)))
                return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= entry.timestamp
            except psutil.NoSuchProcess:
                return False
    return False
