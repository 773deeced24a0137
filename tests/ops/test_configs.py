"""Every constant that the paper does not give says so: a field's help names its origin."""

import importlib
import pkgutil

import pytest

import assets
import ops
from models.config import OpConfig
from models.flux_fill.config import SamplingConfig
from ops.edit import EditConfig
from ops.evaluate import EvaluateConfig

ORIGINS = ("ours", "paper", "authors")


def _configs() -> list[type[OpConfig]]:
    for package in (ops, assets):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    found, kinds = set(), [OpConfig]
    while kinds:
        found |= {*(below := kinds.pop().__subclasses__())}
        kinds += below
    return sorted((kind for kind in found if kind.__module__.startswith(("ops.", "assets.", "models."))), key=lambda kind: kind.__name__)


CONFIGS = _configs()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_names_its_origin(config):
    silent = [
        name for name, field in config.model_fields.items() if not any(origin in (field.description or "").lower() for origin in ORIGINS)
    ]
    assert not silent, f"{config.__name__}: {silent}"


def test_every_stage_has_a_configuration():
    assert len(CONFIGS) >= 16 and {EditConfig, EvaluateConfig, SamplingConfig} <= {*CONFIGS}


def test_unknown_keys_and_changes_are_refused():
    config = CONFIGS[0]()
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, next(iter(type(config).model_fields)), None)
    with pytest.raises(ValueError, match="no_such_field"):
        CONFIGS[0](no_such_field=1)
