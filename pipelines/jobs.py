"""Jobs: the whole chain, retraining from the labels or from the reward model on, and the purge of old event logs.

Selections are `AssetSelection` objects: DVC pins an ANTLR runtime under which every selection string crashes.
"""

import time

import dagster as dg

from assets.chain import POLICY, PREFERENCES, STAGES
from assets.checks import GATE

# Both reference modes in one run: Dagster's tags for a single-run range over the policy's partitions.
ALL_MODES = {
    "dagster/asset_partition_range_start": POLICY.modes[0],
    "dagster/asset_partition_range_end": POLICY.modes[-1],
}

whole_chain = dg.define_asset_job(
    "whole_chain",
    dg.AssetSelection.assets(*(dg.AssetKey(stage.name) for stage in STAGES)),
    description="Images through every stage, both policy partitions in one run.",
)
preferences_onward = dg.define_asset_job(
    "preferences_onward",
    dg.AssetSelection.assets(dg.AssetKey(PREFERENCES.name)).downstream(),
    description="Retrain on the labels there are now: reward model, policies, evaluation, export, release.",
)
policy_onward = dg.define_asset_job(
    "policy_onward",
    dg.AssetSelection.assets(dg.AssetKey(POLICY.name)).downstream(),
    description="Tune again under the present reward model, evaluate, export, release.",
)


def purgeable(instance: dg.DagsterInstance, before: float) -> list[str]:
    """Ids of finished runs older than `before` (Unix time) that hold no asset's latest materialization and no gate's latest verdict.

    Automation asks for the verdict, and a check may have been run again without its asset.
    """
    kept: set[str | None] = set()
    for stage in STAGES:
        key = dg.AssetKey(stage.name)
        for partition in stage.modes or (None,):
            wanted = dg.AssetRecordsFilter(key, asset_partitions=[partition] if partition else None)
            kept |= {record.run_id for record in instance.fetch_materializations(wanted, limit=1).records}
    gates = [dg.AssetCheckKey(dg.AssetKey(stage.name), GATE) for stage in STAGES]
    verdicts = instance.event_log_storage.get_asset_check_summary_records(gates)
    kept |= {record.last_completed_run_id for record in verdicts.values()}
    finished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED])
    records = instance.get_run_records(finished)
    return [r.dagster_run.run_id for r in records if r.create_timestamp.timestamp() < before and r.dagster_run.run_id not in kept]


def purge_job(keep_days: int) -> dg.JobDefinition:
    """A job that deletes old event logs: Dagster itself never does, and metadata with pictures grows."""

    @dg.op(description=f"Delete finished runs older than {keep_days} days, except those an asset's latest version or verdict came from.")
    def purge_event_logs(context: dg.OpExecutionContext) -> None:
        ids = purgeable(context.instance, time.time() - keep_days * 86_400)
        for run_id in ids:
            context.instance.delete_run(run_id)
        context.log.info(f"purged {len(ids)} runs")

    @dg.job(description=f"Purge event logs older than {keep_days} days.")
    def purge() -> None:
        purge_event_logs()

    return purge
