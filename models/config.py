"""The base of every operation's configuration: flat, frozen, validated at construction.

YAML presets, the command line and Dagster's launchpad are three spellings of the same class, so fields are plain
scalars and lists (Dagster config allows neither tuples nor nested models). A field whose value the paper does not give
says "ours" in its description; tests/ops/test_configs.py checks it.
"""

from __future__ import annotations

import hashlib
import json

import pydantic


class OpConfig(pydantic.BaseModel):
    """Base class of op configurations. Unknown keys are refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """SHA-256 (hex) of the resolved values: two equal configurations have equal digests."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
