"""The Dagster code location: every asset, gate, job, schedule and sensor under the chosen preset.

    dg check defs                                            # does it load
    ONEREWARD_PRESET=flux-fill dagster dev -m pipelines.definitions

The preset is what ONEREWARD_PRESET names (default mini); the launchpad shows its values and may override them for one run.
"""

from __future__ import annotations

import os
import warnings

import dagster as dg

warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from assets.chain import STAGES  # noqa: E402
from assets.checks import gate_checks  # noqa: E402
from assets.settings import Settings  # noqa: E402
from assets.sources import ROOT  # noqa: E402
from infra.workspace import STORE_VARIABLE  # noqa: E402
from models.blind import BLIND  # noqa: E402
from models.errors import ConfigError  # noqa: E402
from models.mini.acceptance import ACCEPTANCE  # noqa: E402
from models.mini.measures import MEASURES  # noqa: E402
from models.taxonomy import Taxonomy  # noqa: E402
from pipelines import automation, jobs, schedules, sensors  # noqa: E402
from pipelines.config import load_settings  # noqa: E402
from pipelines.promotion_jobs import promotion_jobs  # noqa: E402
from pipelines.terminal import terminal_logger  # noqa: E402


def _check_measures(taxonomy: Taxonomy) -> None:
    """A measure that is not there would be missed by the evaluation alone, hours after the run began."""
    for dimension in taxonomy.dimensions:
        for field, name, known in (
            ("labelled_by", dimension.labelled_by, MEASURES),
            ("accepted_by", dimension.accepted_by, ACCEPTANCE),
            ("measured_by", dimension.measured_by, BLIND),
            ("confirmed_by", dimension.confirmed_by, BLIND),
        ):
            if name not in known:
                raise ConfigError(
                    f"Dimension {dimension.name!r} of the taxonomy is {field} the unknown {name!r}.", f"Use one of {', '.join(known)}."
                )


def definitions(settings: Settings) -> dg.Definitions:
    """Everything Dagster knows of this code location.

    Raises ConfigError for a preset section that is no stage, and for a taxonomy that names a measure which is not there.
    """
    _check_measures(Taxonomy.load(ROOT / settings.taxonomy if settings.taxonomy else None))
    if unknown := set(settings.stages) - {stage.name for stage in STAGES}:
        raise ConfigError(
            f"Preset {settings.preset!r} has sections that are no stage: {', '.join(sorted(unknown))}.",
            f"Stages are {', '.join(stage.name for stage in STAGES)}.",
        )
    return dg.Definitions(
        assets=[automation.with_house_rules(stage, settings) for stage in STAGES],
        asset_checks=gate_checks(settings),
        jobs=[
            jobs.whole_chain,
            jobs.preferences_onward,
            jobs.policy_onward,
            jobs.purge_job(settings.keep_events_days),
            *promotion_jobs(settings),
        ],
        schedules=[schedules.weekly_retraining(settings)],
        sensors=[sensors.enough_new_labels(settings.retrain_after_labels), automation.sensor],
        loggers={"console": terminal_logger},
        executor=dg.in_process_executor,  # a process per step would import torch again each time
    )


_settings = load_settings()
os.environ[STORE_VARIABLE] = os.environ.get(STORE_VARIABLE) or _settings.store  # a location may be loaded without `onereward`
defs = definitions(_settings)
