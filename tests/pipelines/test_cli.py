"""The command line: exit codes, one clear line per error, and what each command prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from assets.sources import ROOT
from infra.stores.dvc import DvcStore
from infra.workspace import Workspace
from models.records import Condition, write_rows
from models.shards import ShardWriter
from ops.edit import EditConfig, edit
from ops.folders import write_metrics
from pipelines.chain_run import Ending, Outcome
from pipelines.config import load_settings
from tests.pipelines.conftest import Command

SIZE = (64, 64)


def picture(path: Path, colour: str = "red", size: tuple[int, int] = SIZE) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def masked(path: Path) -> Path:
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (16, 16, 40, 48))
    mask.save(path)
    return path


def test_help_names_every_command(onereward: Command) -> None:
    code, out, _ = onereward("--help")
    assert code == 0
    for command in ("run", "dev", "doctor", "edit", "report", "versions", "promote", "rollback", "gc", "pretrain-mini", "labels"):
        assert f" {command} " in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "--preset", "maxi"), "no preset 'maxi'"),
        (("versions", "nothing"), "'nothing'"),
        (("report",), "no report"),
        (("report", "7"), "no report 7"),
        (("promote", "12345678", "production"), "12345678"),
        (("rollback",), "no earlier version"),
        (("labels", "export", "out.jsonl"), "No candidates"),
        (("edit", "image.png", "mask.png", "--prompt", "x"), "No release is in production"),
        (("edit", "image.png", "mask.png", "--from", "base"), "no prompt"),
        (("edit", "image.png", "mask.png", "--from", "base", "--task", "paint"), "'paint'"),
        (("edit", "image.png", "mask.png", "--from", "base", "--task", "paint", "--prompt", "x"), "'paint'"),
        (("edit", "image.png", "mask.png", "--prompt", "x", "--out", "nowhere/out.png"), "nowhere/out.png"),
        (("edit", "image.png", "mask.png", "--prompt", "x", "--out", "out.docx"), "'out.docx'"),
        (("edit", "image.png", "mask.png", "--prompt", "x", "--out", "."), "does not say in which format"),
        (("run", "--home", "/proc/home"), "/proc/home"),
        (("doctor", "--home", f"{__file__}/home"), "/home/dagster"),
        (("pretrain-mini", "--out", __file__), __file__),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    onereward: Command,
    toy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.setenv("ONEREWARD_PRESET", str(toy()))
    code, _, err = onereward(*arguments)
    assert code == 1 and named in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_leftovers_are_listed_and_removed_when_that_is_said(onereward: Command, home: Path) -> None:
    store = Workspace.from_env(home).store
    assert isinstance(store, DvcStore)
    left = store.cache.path("0" * 32)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"1" * 200_000)
    code, out, _ = onereward("gc")
    assert (code, left.exists()) == (0, True)
    assert out.splitlines() == [str(left.relative_to(store.root)), "1 files, 0.2 MB would be removed: run it again with --delete"]
    code, out, _ = onereward("gc", "--delete")
    assert (code, left.exists()) == (0, False) and out.endswith("1 files, 0.2 MB removed\n")


@pytest.mark.parametrize(
    ("ending", "code", "required"),
    [("promoted", 0, 0), ("unchanged", 0, 0), ("released", 0, 3), ("refused", 0, 3), ("failed", 1, 1), ("interrupted", 130, 130)],
)
def test_exit_codes_of_a_run(
    onereward: Command, toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, ending: Ending, code: int, required: int
) -> None:
    """The second one with --require-promotion. A release that waits for a person (auto_promote off) is not promoted."""
    outcome = Outcome(ending, "why", "run", artifacts={}, reused=[], seconds={}, gates=[], gate_s=0)
    monkeypatch.setattr("pipelines.report.run_and_report", lambda *_: (outcome, None))
    command = ("run", "--preset", str(toy()))
    assert (onereward(*command)[0], onereward(*command, "--require-promotion")[0]) == (code, required)


def test_missing_weights_end_a_run_with_their_remedy(onereward: Command, toy: Callable[..., Path], home: Path) -> None:
    preset = toy(models={"flux": "nowhere/flux"}, source_images={"n_scenes": 4, "crops_per_photo": 0})
    code, _, err = onereward("run", "--preset", str(preset))
    assert code == 1 and "curated_dataset: There is no weights folder" in err and "correct `models`" in err
    assert {version.ref.name for version in Workspace.from_env(home).store.versions()} == {"source_images"}


@pytest.mark.parametrize("name", ["clip", "second_judge"])
def test_what_the_evaluation_alone_takes_is_missed_before_anything_is_made(
    name: str, onereward: Command, toy: Callable[..., Path], home: Path
) -> None:
    code, _, err = onereward("run", "--preset", str(toy(models={name: "nowhere/weights"})))
    assert code == 1 and err.startswith("error: There is no weights folder") and "correct `models`" in err and err.count("\n") == 1
    assert not Workspace.from_env(home).store.versions()


def test_an_error_of_many_lines_ends_a_run_with_its_remedy_on_one(onereward: Command, toy: Callable[..., Path]) -> None:
    preset = toy(source_images={"path": "no\nsuch\nfolder"})
    code, _, err = onereward("run", "--preset", str(preset))
    assert code == 1 and err.startswith("error: source_images: ") and err.count("\n") == 1
    assert "no ... folder does not exist. Give a folder of images or a JSONL manifest." in err


def test_edit_keeps_what_is_outside_the_mask(onereward: Command, toy: Callable[..., Path], tmp_path: Path) -> None:
    image, mask, out = picture(tmp_path / "image.png"), masked(tmp_path / "mask.png"), tmp_path / "out.png"
    arguments = ["edit", str(image), str(mask), "--task", "remove", "--from", "base", "--steps", "1", "--out", str(out)]
    code, said, err = onereward(*arguments, "--preset", str(toy()))
    assert code == 0, err
    assert said == f"{out}\n"
    edited = Image.open(out)
    assert edited.size == SIZE and edited.getpixel((2, 2)) == (255, 0, 0) and edited.getpixel((20, 20)) != (255, 0, 0)


def test_edit_samples_as_the_preset_is_evaluated(onereward: Command, toy: Callable[..., Path], tmp_path: Path) -> None:
    image, mask, out = picture(tmp_path / "image.png"), masked(tmp_path / "mask.png"), tmp_path / "out.png"
    sampling: dict[str, Any] = {"steps": 2, "true_cfg": 2.0, "guidance_scale": 1.5, "negative_prompt": "blurry"}
    preset = toy(evaluation=sampling)
    code, _, err = onereward("edit", str(image), str(mask), "--prompt", "x", "--from", "base", "--out", str(out), "--preset", str(preset))
    assert code == 0, err
    asked = {"image": image, "mask": mask, "prompt": "x"}
    base = Path(load_settings(str(preset)).flux)
    assert edit(EditConfig(**sampling), base, **asked).tobytes() == Image.open(out).tobytes()
    assert edit(EditConfig(**sampling | {"true_cfg": 1.0}), base, **asked).tobytes() != Image.open(out).tobytes()


def test_edit_names_what_is_wrong_in_the_preset(onereward: Command, toy: Callable[..., Path], tmp_path: Path) -> None:
    image, mask = picture(tmp_path / "image.png"), masked(tmp_path / "mask.png")
    preset = toy(evaluation={"true_cfg": "strong"})
    code, _, err = onereward("edit", str(image), str(mask), "--prompt", "x", "--from", "base", "--preset", str(preset))
    assert code == 1 and err.startswith("error: Section 'evaluation' of preset") and "true_cfg" in err


def test_edit_names_a_mask_of_another_size(onereward: Command, toy: Callable[..., Path], tmp_path: Path) -> None:
    image, mask = picture(tmp_path / "image.png", size=(80, 64)), masked(tmp_path / "mask.png")
    code, _, err = onereward("edit", str(image), str(mask), "--prompt", "x", "--from", "base", "--preset", str(toy()))
    assert code == 1 and "64x64" in err and "80x64" in err


def test_versions_show_numbers_digests_and_stages(onereward: Command, home: Path, tmp_path: Path) -> None:
    store = Workspace.from_env(home).store
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_metrics(folder, {"number": number})
        ref = store.put("release", folder, key=str(number))
    store.assign(ref, "production", approver="kim", reason="test")
    code, out, _ = onereward("versions", "release", "--verify")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[1].split()[:2] == ["release", "1"] and "production" not in lines[1]
    assert ref.digest[:12] in lines[2] and lines[2].endswith("production verified")


@pytest.fixture
def candidates(home: Path, tmp_path: Path) -> list[str]:
    """A stored request to remove something with two candidates; the candidates' ids."""
    store = Workspace.from_env(home).store
    curated, answered = tmp_path / "curated", tmp_path / "candidates"
    curated.mkdir()
    answered.mkdir()
    condition = Condition(id="c1", source_id="s1", task="remove", prompt="remove", split="train", kind="user")
    write_rows(curated / "conditions.jsonl", [condition])
    with ShardWriter(curated) as shards:
        shards.add("c1.image", Image.new("RGB", SIZE, "red"))
        shards.add("c1.mask", Image.open(masked(tmp_path / "mask.png")))
    write_metrics(curated, {})
    parent = store.put("curated_dataset", curated, key="1")
    row = {"condition_id": "c1", "seed": 0, "steps": 4, "negative_prompt": "", "true_cfg": 1.0, "guidance_scale": 1.0}
    rows = [{**row, "id": f"c1.{n}", "index": n, "strength": 1.0, "scheduler": "x", "model_digest": "x"} for n in range(2)]
    (answered / "candidates.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with ShardWriter(answered) as shards:
        for each, colour in zip(rows, ("green", "blue"), strict=True):
            shards.add(str(each["id"]), Image.new("RGB", SIZE, colour))
    write_metrics(answered, {})
    store.put("candidates", answered, key="1", parents=[parent])
    return [str(each["id"]) for each in rows]


def test_what_is_shown_is_filled_in_imported_and_exported(onereward: Command, candidates: list[str], tmp_path: Path) -> None:
    shown, file, out = tmp_path / "shown", tmp_path / "labels.jsonl", tmp_path / "out.jsonl"
    assert onereward("labels", "show", str(shown))[:2] == (0, f"1 requests in {shown}\n")
    sheet = Image.open(shown / "c1.png")
    colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**16) or ()}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colours  # the source around the mask, one candidate, the other
    question = json.loads((shown / "questions.jsonl").read_text())
    assert question["condition_id"] == "c1" and sorted(question["shown"]) == candidates
    assert question["labels"] == {"removal_quality": {"best": None, "worst": None}}
    code, _, err = onereward("labels", "import", str(shown / "questions.jsonl"))
    assert code == 1 and "line 1" in err  # not filled in yet
    code, _, err = onereward("labels", "show", str(shown))
    assert code == 1 and "is not empty" in err

    label = {**question, "annotator": "kim", "labels": {"removal_quality": {"best": "c1.0", "worst": "c1.1"}}}
    file.write_text(json.dumps(label) + "\n")
    assert onereward("labels", "import", str(file))[:2] == (0, "1 labels new or changed\n")
    assert onereward("labels", "import", str(file))[:2] == (0, "0 labels new or changed\n")
    assert onereward("labels", "export", str(out))[0] == 0
    assert json.loads(out.read_text()) == label
    for wrong in (tmp_path / "nowhere" / "out.jsonl", tmp_path, file / "out.jsonl"):
        code, _, err = onereward("labels", "export", str(wrong))
        assert code == 1 and str(wrong) in err and err.count("\n") == 1
    code, _, err = onereward("labels", "show", str(file / "shown"))
    assert code == 1 and str(file / "shown") in err and err.count("\n") == 1
    file.write_text(json.dumps({**label, "shown": ["c1.1", "c1.9"]}) + "\n")
    code, _, err = onereward("labels", "import", str(file))
    assert code == 1 and "'c1.9'" in err


def test_where_sheets_go_may_be_written_in_any_way(
    onereward: Command, candidates: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, _, err = onereward("labels", "show", ".")
    assert code == 1 and f"{here} is the current folder" in err
    assert onereward("labels", "show", "below/..")[0] == 1
    assert onereward("labels", "show", "../there/")[0] == 0 and (tmp_path / "there" / "questions.jsonl").exists()
    assert not list(here.iterdir())


def test_labels_follow_the_presets_taxonomy(onereward: Command, candidates: list[str], toy: Callable[..., Path], tmp_path: Path) -> None:
    taxonomy = yaml.safe_load((ROOT / "models" / "taxonomy" / "taxonomy.yaml").read_text())
    taxonomy["tasks"]["remove"]["dimensions"] = ["structure"]
    own, file = tmp_path / "taxonomy.yaml", tmp_path / "labels.jsonl"
    own.write_text(yaml.safe_dump(taxonomy))
    preset = ("--preset", str(toy(taxonomy=str(own))))
    label = {"condition_id": "c1", "annotator": "kim", "shown": candidates, "labels": {"structure": {"tie": True}}}
    file.write_text(json.dumps(label) + "\n")
    code, _, err = onereward("labels", "import", str(file))
    assert code == 1 and "'structure'" in err
    assert onereward("labels", "import", str(file), *preset)[:2] == (0, "1 labels new or changed\n")
    assert onereward("labels", "export", str(tmp_path / "out.jsonl"), *preset)[0] == 0
    onereward("labels", "show", str(tmp_path / "shown"), *preset)
    assert '"structure"' in (tmp_path / "shown" / "questions.jsonl").read_text()


def test_pretraining_never_writes_over_weights(onereward: Command, tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    code, _, err = onereward("pretrain-mini", "--out", str(tmp_path))
    assert code == 1 and "is not empty" in err


def test_pretraining_goes_on_where_it_was_interrupted(onereward: Command, tmp_path: Path) -> None:
    for name in ("flux-fill", "judge"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "recipe.json").write_text('{"figures": {}}')
    code, out, err = onereward("pretrain-mini", "--out", str(tmp_path / "out"))
    assert code == 0 and out.count("kept from an earlier run") == 3, err
