"""What applies to every asset alike: automation that respects gates, freshness, and where its code is.

`eager()` alone walks past a failed blocking check of a parent, so the check's verdict is part of the condition.
"""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

from assets.common import Stage
from assets.settings import Settings
from assets.sources import ROOT, source_files

CONDITION = dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()

sensor = dg.AutomationConditionSensorDefinition(
    "keep_chain_current",
    target=dg.AssetSelection.all(),
    description="Makes what is missing or out of date, never below a failed gate.",
)


def code_references(stage: Stage) -> dg.CodeReferencesMetadataValue:
    """The asset's own file and the ops it calls."""
    files = [stage.file, *(path for path in source_files(stage.file) if path.parent == ROOT / "ops" and path.name != "__init__.py")]
    return dg.CodeReferencesMetadataValue(
        code_references=[
            dg.LocalFileCodeReference(file_path=str(path), line_number=1, label=path.relative_to(ROOT).as_posix()) for path in files
        ]
    )


def with_house_rules(stage: Stage, settings: Settings) -> dg.AssetsDefinition:
    """The stage's asset with condition, freshness policy and code references."""
    freshness = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=settings.fresh_days))

    def dressed(spec: dg.AssetSpec) -> dg.AssetSpec:
        spec = spec.replace_attributes(automation_condition=CONDITION, freshness_policy=freshness)
        return spec.merge_attributes(metadata={"dagster/code_references": code_references(stage)})

    return stage.build(settings).map_asset_specs(dressed)
