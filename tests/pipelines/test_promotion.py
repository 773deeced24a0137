"""Promotion by hand is held against the thresholds of the preset it is made under."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from infra.workspace import Workspace
from ops.gate import GateConfig
from tests.ops.test_promote import chain_of, prove, release_of
from tests.pipelines.conftest import Command


def test_evidence_of_a_laxer_preset_is_refused_by_name(onereward: Command, home: Path, toy: Callable[..., Path], tmp_path: Path) -> None:
    store = Workspace.from_env(home).store
    refs = chain_of(store, tmp_path / "work")
    prove(store, refs["evaluation"], thresholds=GateConfig(min_win_rate=0.1))
    release = release_of(store, tmp_path / "work", refs, note="one")
    code, _, err = onereward("promote", release.digest[:12], "candidate")
    assert code == 1 and "evidence for evaluation" in err and "min_win_rate 0.1 (0.55 is in force)" in err
    assert store.moves("release") == []
    preset = str(toy(gates={"min_win_rate": 0.1}))
    code, _, err = onereward("promote", release.digest[:12], "production", "--preset", preset)
    assert code == 1 and "is not in staging" in err and f"onereward promote {release.digest[:12]} staging" in err
    for stage in ("candidate", "staging", "production"):
        code, out, err = onereward("promote", release.digest[:12], stage, "--preset", preset)
        assert (code, out) == (0, f"release v1 ({release.digest[:8]}) is {stage}\n"), err
