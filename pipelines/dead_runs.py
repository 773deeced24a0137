"""Runs whose process is gone: killed by the kernel, a power cut, `kill -9`.

Dagster goes on calling them started. They keep the pool's only slot and the queue's only place, so that the next run would wait
for them for ever. A home may be shared by machines: what another one runs cannot be looked at from here and counts as alive.
"""

from __future__ import annotations

import shutil
import time

import dagster as dg
import psutil

from assets.refs import HOST, HOST_TAG
from infra.workspace import START_TIMEOUT_S, Workspace

UNDER_WAY = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
GONE = "its process is gone; finished stages are kept and the next run goes on from there"


def end_dead_runs(instance: dg.DagsterInstance, workspace: Workspace) -> list[dg.DagsterRun]:
    """Mark the dead as failed and free what they held; the runs that are alive, the oldest first.

    Where none is alive, the drafts in the workspace are nobody's and are removed.
    """
    alive = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=UNDER_WAY), ascending=True):
        run = record.dagster_run
        if _alive(instance, record):
            alive.append(run)
        else:
            instance.report_run_failed(run, GONE)
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if not alive:
        shutil.rmtree(workspace.tmp, ignore_errors=True)
    return alive


def _alive(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    """Whether the process that announced itself in the run's log still runs, and is not a later one of the same number.

    A run that was launched has some time to announce its process.
    """
    run = record.dagster_run
    if run.tags.get(HOST_TAG, HOST) != HOST:
        return True
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        if entry.dagster_event and (pid := entry.dagster_event.engine_event_data.metadata.get("pid")):
            try:
                process = psutil.Process(int(str(pid.value)))
                return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= entry.timestamp
            except psutil.NoSuchProcess:
                return False
    launched_s = time.time() - record.update_timestamp.timestamp()
    return run.status == dg.DagsterRunStatus.STARTING and launched_s < START_TIMEOUT_S
