"""The runner: a version is made once, reused while nothing changed, and nothing is left behind by a failure."""

from __future__ import annotations

import base64
import errno
import importlib.metadata
import io
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from assets.common import Stage, Work, make, stage
from assets.display import INLINE_BYTES, PICTURES, describe, picture
from assets.refs import artifacts_of, materialised
from assets.settings import Settings
from infra.progress import Progress
from infra.stores.base import ArtifactRef
from infra.workspace import Workspace
from models.config import OpConfig
from models.errors import ConfigError, DiskFull, NotEnoughData, UnknownVersion
from models.taxonomy import Taxonomy
from ops.folders import save_picture, write_metrics
from ops.gate import Gate, GateConfig, record_evidence

PLAIN = {"group": "test", "kinds": {"python"}}


class NumberConfig(OpConfig):
    number: int = 1
    fail: str = ""


def _number(work: Work) -> dict[str, Any]:
    (work.out / "number.txt").write_text(str(work.config.number))
    if work.config.fail == "op":
        raise NotEnoughData("Nothing there.", "Add some.")
    if work.config.fail == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if work.config.fail == "checkpoint":
        _save_on_a_full_disk(work.scratch)
    if work.config.fail == "quota":
        raise RuntimeError("cannot save") from OSError(errno.EDQUOT, "Disk quota exceeded")
    if work.config.fail == "ctrl-c":
        raise KeyboardInterrupt
    metrics = {"number": work.config.number, "cells": [{"task": "a", "n": 1}], "unknown": None}
    write_metrics(work.out, metrics)
    return metrics


def _number_and_mode(work: Work) -> dict[str, Any]:
    (work.out / "mode.txt").write_text(str(work.mode))
    return _number(work)


def _save_on_a_full_disk(folder: Path) -> None:
    """Safetensors stops with an error class of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        save_file({"weight": torch.zeros(1_000_000)}, folder / "policy.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _double(work: Work) -> dict[str, Any]:
    """Twice the number."""
    name = "numbers" if "numbers" in work.inputs else "modes-left"
    doubled = 2 * int((work.inputs[name] / "number.txt").read_text())
    (work.out / "number.txt").write_text(str(doubled))
    metrics = {"number": doubled}
    write_metrics(work.out, metrics)
    return metrics


NUMBERS = Stage(name="numbers", work=_number, config=NumberConfig, parents=(), **PLAIN)
DOUBLES = Stage(name="doubles", work=_double, config=NumberConfig, parents=("numbers",), **PLAIN)
MODES = Stage(name="modes", work=_number, config=NumberConfig, parents=(), modes=("left", "right"), **PLAIN)
AFTER_MODES = Stage(name="doubles", work=_double, config=NumberConfig, parents=("modes",), **PLAIN)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("ONEREWARD_HOME", str(tmp_path / "home"))
    return Workspace.from_env()


@pytest.fixture
def instance(tmp_path: Path) -> Any:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def settings(**stages: dict[str, Any]) -> Settings:
    return Settings(preset="test", flux="none", judge="none", threads=1, stages=stages)


def work_for(workspace: Workspace, lines: list[str] | None = None, **config: Any) -> Work:
    return Work(
        stage=NUMBERS,
        config=NumberConfig(**config),
        settings=settings(),
        workspace=workspace,
        store=workspace.store,
        taxonomy=Taxonomy.load(),
        progress=Progress((lines if lines is not None else []).append),
        refs={},
        out=workspace.home,
        scratch=workspace.home,
        run_id="run-1",
    )


def leftovers(workspace: Workspace) -> list[Path]:
    return list((workspace.home / "tmp").rglob("*"))


def test_made_once_then_reused_and_it_says_so(workspace: Workspace) -> None:
    lines: list[str] = []
    first = make(work_for(workspace, lines))
    second = make(work_for(workspace, lines))
    assert (first.reused, second.reused) == (False, True)
    assert first.version.ref == second.version.ref and second.seconds == 0
    assert lines[-1] == f"reused numbers v1 ({first.version.ref.digest[:8]})"
    assert leftovers(workspace) == []


def test_the_record_says_how_it_was_made(workspace: Workspace) -> None:
    version = make(work_for(workspace, number=3)).version
    assert version.config["number"] == 3 and version.config["preset"] == "test" and version.config["taxonomy"] == Taxonomy.load().digest()
    assert version.run_id == "run-1" and version.code_version and version.metadata["number"] == 3


def test_another_value_is_another_version_and_going_back_reuses_the_old_one(workspace: Workspace) -> None:
    one, two = make(work_for(workspace, number=1)), make(work_for(workspace, number=2))
    assert one.version.ref.digest != two.version.ref.digest and two.version.number == 2
    back = make(work_for(workspace, number=1))
    assert back.reused and back.version.ref == one.version.ref


def test_what_else_a_stage_depends_on_is_part_of_its_key(workspace: Workspace) -> None:
    state = {"labels": "1"}
    work = replace(work_for(workspace), stage=replace(NUMBERS, depends=lambda work: dict(state)))
    make(work)
    assert make(work).reused
    state["labels"] = "2"
    assert not make(work).reused


@pytest.mark.parametrize("changed", ["diffusers", "numpy", "scikit-learn"])
def test_another_version_of_a_library_makes_it_anew(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """Of one that all stages share, and of one that this stage names."""
    work = replace(work_for(workspace), stage=replace(NUMBERS, libraries=("scikit-learn",)))
    make(work)
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == changed else installed(name))
    assert not make(work).reused
    assert make(work).reused


@pytest.mark.parametrize(
    ("fail", "error"),
    [("op", NotEnoughData), ("disk", DiskFull), ("checkpoint", DiskFull), ("quota", DiskFull), ("ctrl-c", KeyboardInterrupt)],
)
def test_a_failure_leaves_the_store_as_it_was(workspace: Workspace, fail: str, error: type[BaseException]) -> None:
    make(work_for(workspace))
    before = workspace.store.versions()
    with pytest.raises(error):
        make(work_for(workspace, fail=fail))
    assert workspace.store.versions() == before
    assert leftovers(workspace) == []


def test_the_work_folder_outlives_an_interruption_and_goes_with_success(workspace: Workspace) -> None:
    seen: list[Path] = []
    interrupt = [True]

    def resumable(work: Work) -> dict[str, Any]:
        seen.append(work.scratch)
        if interrupt.pop():
            (work.scratch / "checkpoint").write_text("half")
            raise KeyboardInterrupt
        assert (work.scratch / "checkpoint").read_text() == "half"
        return _number(work)

    work = replace(work_for(workspace), stage=replace(NUMBERS, work=resumable))
    with pytest.raises(KeyboardInterrupt):
        make(work)
    interrupt.append(False)
    make(work)
    assert seen[0] == seen[1] and not seen[0].exists()


def run(instance: dg.DagsterInstance, *stages: Stage, only: str | None = None, **sections: Any) -> dg.ExecuteInProcessResult:
    assets = [each.build(settings(**sections)) for each in stages]
    selection = dg.AssetSelection.assets(dg.AssetKey(only)) if only else dg.AssetSelection.all()
    return dg.materialize(assets, instance=instance, selection=selection, raise_on_error=False)


def message(result: dg.ExecuteInProcessResult) -> str:
    """The innermost error of a failed run."""
    error = next(event.step_failure_data.error for event in result.all_events if event.is_step_failure)
    while error.cause:
        error = error.cause
    return error.message


def test_assets_hand_each_other_refs(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    result = run(instance, NUMBERS, DOUBLES, numbers={"number": 4})
    assert result.success
    event = result.asset_materializations_for_node("doubles")[0]
    ref = artifacts_of(event)["doubles"]
    assert (workspace.store.get(ref) / "number.txt").read_text() == "8"
    parents = workspace.store.version(ref.digest).parents
    assert parents == (materialised(instance, "numbers")["numbers"],)
    assert event.tags["dagster/data_version"] == ref.digest


def test_one_asset_alone_takes_the_latest_parent(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    run(instance, NUMBERS, DOUBLES, numbers={"number": 4})
    run(instance, NUMBERS, DOUBLES, only="numbers", numbers={"number": 5})
    result = run(instance, NUMBERS, DOUBLES, only="doubles")
    assert result.asset_materializations_for_node("doubles")[0].metadata["number"].value == 10


def test_a_parent_never_materialised_is_named(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    result = run(instance, NUMBERS, DOUBLES, only="doubles")
    assert not result.success and "numbers was never materialised" in message(result)


def judged(workspace: Workspace, ref: ArtifactRef, measure: float, *, passed: bool) -> None:
    told = {"code_version": "1", "not_verified": [], "run_id": "run", "tmp": workspace.tmp}
    record_evidence(workspace.store, workspace.keys, ref, [Gate("good", measure, 0.5, passed, "at least")], GateConfig(), **told)


def test_nothing_is_made_from_what_a_gate_refused(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    """The run whose check failed is over; this is another one."""
    run(instance, NUMBERS, DOUBLES, only="numbers")
    ref = materialised(instance, "numbers")["numbers"]
    judged(workspace, ref, 0.1, passed=False)
    result = run(instance, NUMBERS, DOUBLES, only="doubles")
    assert not result.success and f"A gate refused numbers {ref.digest[:8]}" in message(result)
    judged(workspace, ref, 0.9, passed=True)
    assert run(instance, NUMBERS, DOUBLES, only="doubles").success


def test_modes_are_artifacts_of_their_own_with_or_without_partitions(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    assert run(instance, MODES).success
    asset = MODES.build(settings(modes={"number": 2}))
    dg.materialize([asset], instance=instance, partition_key="right")
    refs = materialised(instance, "modes")
    assert {name: (workspace.store.get(ref) / "number.txt").read_text() for name, ref in refs.items()} == {
        "modes-left": "1",
        "modes-right": "2",
    }
    assert instance.get_materialized_partitions(dg.AssetKey("modes")) == {"left", "right"}


def test_a_range_of_modes_gives_each_partition_its_own_figures(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    tags = {"dagster/asset_partition_range_start": "left", "dagster/asset_partition_range_end": "right"}
    two = replace(MODES, work=_number_and_mode)
    dg.materialize([two.build(settings())], instance=instance, tags=tags)
    digests = set()
    for mode in MODES.modes:
        wanted = dg.AssetRecordsFilter(dg.AssetKey("modes"), asset_partitions=[mode])
        event = instance.fetch_materializations(wanted, limit=1).records[0].asset_materialization
        assert event is not None and event.tags is not None
        ref = artifacts_of(event)[f"modes-{mode}"]
        assert event.metadata["name"].value == ref.name and (workspace.store.get(ref) / "mode.txt").read_text() == mode
        assert event.tags["dagster/data_version"] == ref.digest and event.tags["dagster/code_version"]
        digests.add(ref.digest)
    assert len(digests) == 2


def test_a_refused_mode_is_left_out(workspace: Workspace, instance: dg.DagsterInstance) -> None:
    run(instance, MODES, modes={"number": 3})
    # Both modes hold the same bytes here, so evidence about one speaks of both: give the right one other bytes.
    dg.materialize([MODES.build(settings(modes={"number": 4}))], instance=instance, partition_key="right")
    right = materialised(instance, "modes")["modes-right"]
    judged(workspace, right, 0.1, passed=False)
    result = run(instance, MODES, AFTER_MODES, only="doubles")
    parents = workspace.store.version(artifacts_of(result.asset_materializations_for_node("doubles")[0])["doubles"].digest).parents
    assert [parent.name for parent in parents] == ["modes-left"]


def test_a_preset_section_must_fit_the_op() -> None:
    with pytest.raises(ConfigError, match=r"'numbers'[\s\S]*number"):
        NUMBERS.build(settings(numbers={"number": "many"}))


def test_a_decorated_function_is_a_stage_of_its_name() -> None:
    @stage(config=NumberConfig, parents=(), **PLAIN)
    def counted(work: Work) -> dict[str, Any]:
        """Counts."""
        return {}

    assert counted.name == "counted" and counted.build(settings()).specs_by_key[dg.AssetKey("counted")].description == "Counts."


def test_a_release_is_resolved_once_and_named_when_missing(workspace: Workspace) -> None:
    work = work_for(workspace)
    assert work.release("base") is None
    with pytest.raises(UnknownVersion, match="'production'"):
        work.release("production")


def test_figures_tables_and_pictures_are_shown(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, {"a": {"b": 0.5, "bad": float("nan")}, "cells": [{"task": "x", "win": 0.123456}], "none": None, "names": ["p", "q"]}
    )
    save_picture(tmp_path, "grid", Image.new("RGB", (8, 8), "red"))
    shown = describe(tmp_path)
    assert shown["a.b"] == 0.5 and shown["a.bad"] == "nan" and shown["names"] == "['p', 'q']" and "none" not in shown
    assert shown["cells"].value.splitlines() == ["| task | win |", "| --- | --- |", "| x | 0.1235 |"]
    assert shown["picture grid"].value.startswith("![grid](data:image/png;base64,")


def test_pictures_that_sum_up_come_before_those_of_single_tasks(tmp_path: Path) -> None:
    write_metrics(tmp_path, {})
    for name in ("examples-a", "grid-b", "win-rates", "cells", *(f"grid-{letter}" for letter in "cdefgh")):
        save_picture(tmp_path, name, Image.new("RGB", (8, 8), "red"))
    shown = [name.removeprefix("picture ") for name in describe(tmp_path)]
    assert shown[:4] == ["cells", "win-rates", "examples-a", "grid-b"] and len(shown) == PICTURES


def test_a_large_picture_is_made_small_enough(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (512, 512), os.urandom(512 * 512 * 3))
    noise.save(tmp_path / "noise.png")
    shown = picture(tmp_path / "noise.png").value
    assert shown.startswith("![noise](data:image/webp;base64,") and len(shown) <= INLINE_BYTES + 100
    with Image.open(io.BytesIO(base64.b64decode(shown.rsplit(",", 1)[1].rstrip(")")))) as opened:
        assert opened.width == opened.height >= 64
