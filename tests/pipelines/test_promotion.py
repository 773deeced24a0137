"""Promotion by hand, as the on-call engineer does it: commands and jobs over a whole chain in a real registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from infra.stores.base import ArtifactRef
from infra.stores.dvc import DvcStore
from ops.gate import GateConfig
from pipelines.config import load_settings
from pipelines.promotion_jobs import JOBS, promotion_jobs
from tests.ops.promotable import Refs, chain_of, prove, release_of
from tests.pipelines.conftest import Command

BY = ("--approver", "kim", "--reason", "test")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Refs]:
    folder = tmp_path_factory.mktemp("template")
    store = DvcStore(folder / "registry")
    refs = chain_of(store, folder / "work")
    refs["release"] = release_of(store, folder / "work", refs, note="one")
    refs["next"] = release_of(store, folder / "work", refs, note="two")
    return folder, refs


@pytest.fixture
def refs(template: tuple[Path, Refs], home: Path) -> Refs:
    """A chain with two releases in the test's home."""
    shutil.copytree(template[0], home)
    return template[1]


@pytest.fixture
def store(refs: Refs, home: Path) -> DvcStore:
    return DvcStore(home / "registry")


def take(onereward: Command, ref: ArtifactRef, *more: str) -> None:
    """A release up to production."""
    for stage in ("candidate", "staging", "production"):
        code, out, err = onereward("promote", ref.digest[:12], stage, *BY, *more)
        assert code == 0 and f"({ref.digest[:8]}) is {stage}" in out, err


def failed(onereward: Command, *arguments: str) -> str:
    """The one line that a command ends with."""
    code, _, err = onereward(*arguments)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_evidence_of_a_laxer_preset_is_refused_by_name(onereward: Command, store: DvcStore, refs: Refs, toy: Callable[..., Path]) -> None:
    prove(store, refs["evaluation"], thresholds=GateConfig(min_win_rate=0.1))
    err = failed(onereward, "promote", refs["release"].digest[:12], "candidate")
    assert "evidence for evaluation" in err and "min_win_rate 0.1 (0.55 is in force)" in err
    assert store.moves("release") == []
    take(onereward, refs["release"], "--preset", str(toy(gates={"min_win_rate": 0.1})))


def test_a_night_on_call(onereward: Command, store: DvcStore, refs: Refs, home: Path) -> None:
    """Promote, look, roll back, verify: what each command prints is what the runbook says."""
    err = failed(onereward, "promote", refs["next"].digest[:12], "production")
    assert "is not in staging" in err and f"onereward promote {refs['next'].digest[:12]} staging" in err
    take(onereward, refs["release"])
    take(onereward, refs["next"])
    assert json.loads((home / "production.json").read_text())["digest"] == refs["next"].digest
    assert onereward("rollback", *BY)[:2] == (0, f"release v1 ({refs['release'].digest[:8]}) is production again\n")
    assert json.loads((home / "production.json").read_text())["digest"] == refs["release"].digest

    code, out, _ = onereward("audit")
    assert code == 0 and out.count("kim: test") == 7 and "the log holds: 7 entries" in out
    assert f"production  v2 -> v1 ({refs['release'].digest[:12]})  kim: test" in out
    code, out, _ = onereward("verify")
    lines = out.splitlines()
    assert code == 0 and all(line.startswith("ok  ") for line in lines)
    assert lines[0].startswith("ok  audit log of release: 7 entries") and lines[-1].startswith("ok  source_images v1")
    code, out, _ = onereward("show", refs["release"].digest[:12])
    assert code == 0 and "stages   production" in out and "signed   by a trusted key" in out and "passed win_rate: measured 1" in out
    code, out, _ = onereward("diff", refs["release"].digest[:12], refs["next"].digest[:12])
    assert code == 0 and "file metrics.json: changed" in out and "config" not in out


def test_verify_names_the_first_mismatch(onereward: Command, store: DvcStore, refs: Refs, home: Path) -> None:
    take(onereward, refs["release"])
    pointer = home / "production.json"
    content = pointer.read_text()
    pointer.write_text(content.replace('"version": 1', '"version": 2'))
    assert "production.json does not say what production is" in failed(onereward, "verify")
    take(onereward, refs["release"])  # moves nothing, and writes the file again
    assert pointer.read_text() == content
    path = store.get(refs["source_images"]) / "metrics.json"
    for copy in [p for p in store.root.rglob("*") if p.is_file() and ".git/" not in str(p) and p.read_bytes() == path.read_bytes()]:
        copy.chmod(0o644)
        copy.write_text("{}")
    err = failed(onereward, "verify")
    assert f"source_images 1 ({refs['source_images'].digest[:12]})" in err


def test_an_override_is_seen_everywhere(onereward: Command, store: DvcStore, refs: Refs) -> None:
    prove(store, refs["evaluation"], failing="win_rate")
    digest = refs["release"].digest[:12]
    assert "did not pass win_rate" in failed(onereward, "promote", digest, "candidate")
    assert "evaluation/win" in failed(onereward, "approve", digest, *BY, "--override", "evaluation/win")
    code, out, err = onereward("approve", digest, "--approver", "lee", "--reason", "seen by eye", "--override", "evaluation/win_rate")
    said = "approved by lee: seen by eye (OVERRIDE of evaluation/win_rate)"
    assert (code, out) == (0, f"{said}\n"), err
    take(onereward, refs["release"])
    for command in (("versions", "release"), ("show", digest), ("audit",), ("verify",)):
        code, out, err = onereward(*command)
        assert code == 0 and said in out, (command, err)


def test_loading_refuses_what_is_not_vouched_for(onereward: Command, store: DvcStore, refs: Refs, home: Path) -> None:
    take(onereward, refs["release"])
    trusted = home / "keys" / "trusted"
    trusted.rename(home / "elsewhere")
    edit = ("edit", "image.png", "mask.png", "--prompt", "x")
    assert "is not signed by a trusted key" in failed(onereward, *edit)
    assert "not trusted here" in failed(onereward, *edit, "--from", refs["release"].digest[:12])
    (home / "elsewhere").rename(trusted)
    code, out, err = onereward("keys", "rotate", *BY)
    old = out.splitlines()[1].split()[2].rstrip(";")
    assert code == 0 and (trusted / f"{old}.pub").exists(), err
    assert onereward("verify")[0] == 0 and "signing key replaced: test" in onereward("audit")[1]
    (trusted / f"{old}.pub").unlink()
    assert onereward("audit")[0] == 0  # the new key vouches for the log so far
    assert "not trusted here" in failed(onereward, "verify")


def test_a_release_that_does_not_say_how_it_was_sampled_is_said_to(onereward: Command, refs: Refs) -> None:
    """One of before it was kept: the preset's sampling is taken, not without a word."""
    code, _, err = onereward("edit", "image.png", "mask.png", "--prompt", "x", "--from", refs["release"].digest[:12])
    said, error = err.splitlines()
    assert code == 1 and "does not say how it was sampled" in said and error.startswith("error: ") and "image.png" in error


def test_every_command_is_a_job_that_asks_why(store: DvcStore, refs: Refs, home: Path, instance: dg.DagsterInstance) -> None:
    jobs = {job.name: job for job in promotion_jobs(load_settings("mini"))}
    assert set(jobs) == {"promote", "rollback", "approve", "versions", "show", "diff", "audit", "verify"} == set(JOBS)

    def execute(name: str, **config: str) -> dg.ExecuteInProcessResult:
        by = {"approver": "kim", "reason": "test"}
        run_config = {"ops": {f"{name}_op": {"config": {**by, **config}}}}
        return jobs[name].execute_in_process(run_config=run_config, instance=instance, raise_on_error=False)

    digest = refs["release"].digest
    assert not execute("promote", digest=digest, stage="production").success and store.moves("release") == []
    for stage in ("candidate", "staging", "production"):
        assert execute("promote", digest=digest, stage=stage).success
    move = store.moves("release", "production")[-1]
    assert (move.digest, move.approver, move.reason) == (digest, "kim", "test")
    assert json.loads((home / "production.json").read_text())["digest"] == digest
    assert execute("verify").success and execute("show", digest=digest).success and not execute("rollback").success
    with pytest.raises(dg.DagsterInvalidConfigError):
        jobs["audit"].execute_in_process(run_config={"ops": {"audit_op": {"config": {"approver": "kim"}}}}, instance=instance)
