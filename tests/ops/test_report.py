"""The report says what happened, wherever the chain stopped, in one file that needs nothing else."""

import gzip
import html.parser
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from infra.stores.base import ArtifactRef, Version
from models.errors import DiskFull, UnknownVersion
from models.masks import make_mask
from models.mini.scenes import render_scene
from models.mini.seen import FACTS
from models.records import Condition, write_rows
from models.shards import ShardWriter
from models.taxonomy import Taxonomy
from ops.folders import write_metrics
from ops.policy_watch import summary
from ops.probe import read_checkpoints
from ops.report import RunFacts, write_report
from ops.report_page import TOLD
from ops.win_rates import Item, read_items, recompute, write_items

TAXONOMY = Taxonomy.load()
SILENT = {("text", "text_alignment"), ("text", "legibility")}  # cells that gave no reward
RECORDS = Path(__file__).parent / "records"  # of a run that hacked its judge
CHAIN = {
    "source_images": [],
    "curated_dataset": ["source_images"],
    "candidates": ["curated_dataset"],
    "preferences": ["candidates"],
    "preference_pairs": ["curated_dataset", "candidates", "preferences"],
    "reward_model": ["curated_dataset", "candidates", "preference_pairs"],
    "policy-static": ["curated_dataset", "reward_model"],
    "policy-ema": ["curated_dataset", "reward_model"],
    "evaluation": ["curated_dataset", "reward_model", "policy-static", "policy-ema"],
    "onnx": ["policy-ema"],
    "engine": ["onnx"],
    "release": ["policy-ema", "evaluation", "onnx", "engine"],
}
GATES = [
    {
        "name": "judge_accuracy",
        "measure": 0.71,
        "threshold": 0.6,
        "passed": True,
        "description": "at least: mean accuracy over cells, held-out pairs",
    },
    {"name": "win_rate", "measure": 0.62, "threshold": 0.55, "passed": True, "description": "at least: mean win rate over the base"},
    {
        "name": "engine_verified",
        "measure": 0.0,
        "threshold": None,
        "passed": True,
        "description": "1 when the engine was executed on a GPU",
    },
]
RELEASE = {"version": 3, "stage": "production", "digest": "f" * 64}


def _version(name: str, number: int) -> Version:
    digests = {each: f"{i:02x}" * 32 for i, each in enumerate(CHAIN)}
    parents = tuple(ArtifactRef(parent, digests[parent], "", 1) for parent in CHAIN[name])
    return Version(ArtifactRef(name, digests[name], "", 3_200_000), number, "", parents, "run", "2025-01-01T00:00:00Z", "code")


def _judge(rng: np.random.Generator, split: str) -> dict[str, Any]:
    cells = []
    for task, dimension in TAXONOMY.cells:
        accuracy = float(rng.uniform(0.6, 0.85))
        cell = {"task": task, "dimension": dimension, "n": 40, "accuracy": accuracy, "lo": accuracy - 0.12, "hi": accuracy + 0.1}
        cells.append({**cell, "base_accuracy": 0.5})
    return {"split": split, "mean_accuracy": 0.71, "base_mean_accuracy": 0.52, "order_consistency": 0.9, "n": 680, "cells": cells}


def _evaluation(folder: Path, curated: Path, rng: np.random.Generator) -> None:
    """Four scenes and a photo per task, the base's edits blurred, the others' less."""
    items: list[Item] = []
    rows = []
    with ShardWriter(folder) as edits, ShardWriter(curated) as sources:
        for seed, (task, number) in enumerate((task, number) for task in TAXONOMY.active for number in range(5)):
            scene, key = render_scene(seed), f"{task.name}-{number}"
            mask = make_mask("box", scene.image.size, region=None, rng=rng)
            kind = "photo" if number == 2 else "scene"
            prompt = task.fixed_prompt or scene.caption
            rows.append(Condition(id=key, source_id=f"s{seed}", task=task.name, prompt=prompt, split="test", kind=kind))
            sources.add(f"{key}.image", scene.image)
            sources.add(f"{key}.mask", mask)
            if kind == "scene":
                sources.add(f"{key}.target", scene.image)
            for policy, blur, skill in [("base", 4, 0.0), ("static", 3, 0.02), ("ema", 1, 0.03)]:
                edit = scene.image.copy()
                edit.paste(scene.image.filter(ImageFilter.GaussianBlur(blur)), mask=mask)
                edits.add(f"{key}.{seed}.{policy}", edit)
                measures = {name: float(-0.2 + skill + 0.05 * rng.normal()) for name in task.dimensions} if kind == "scene" else {}
                opinions = {} if policy == "base" else {"base": {name: rng.uniform(0.2, 0.9, 2).tolist() for name in task.dimensions}}
                items.append(
                    Item(
                        split="test",
                        condition_id=key,
                        source_id=f"s{seed}",
                        origin=f"s{seed}",
                        task=task.name,
                        kind=kind,
                        prompt=prompt,
                        seed=seed,
                        policy=policy,
                        policy_digest="",
                        judge_digest="",
                        measures=measures,
                        confirming_measures=measures,
                        judge=opinions,
                        preservation_psnr=30 + blur / 10,
                        outside_similarity=0.9 + blur / 100,
                        withheld_psnr=20.0 - blur if kind == "photo" and task.condition != "clean" else None,
                        seen={"gone": policy != "base"} if kind == "scene" and task.condition == "clean" else {},
                    )
                )
    write_rows(curated / "conditions.jsonl", rows)
    write_items(folder / "items.jsonl", items)
    metrics = recompute(items, TAXONOMY, split="test", choose_split="none", tie_tolerance=0.02, resamples=200)
    (folder / "judge-pairs.jsonl").write_text('{"judge": "base"}\n')
    write_metrics(folder, {**metrics, "judge": _judge(rng, "test"), "sampling": {"steps": 8, "true_cfg": 3.0}})


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small folder per artifact, with what the ops write into it."""
    root, rng = tmp_path_factory.mktemp("artifacts"), np.random.default_rng(0)
    made = {name: root / name for name in CHAIN}
    for folder in made.values():
        folder.mkdir()
        write_metrics(folder, {})
    counts = {"n_train": 120, "n_validation": 30, "n_test": 40, "ties": 12, "dropped_share": 0.06, "first_wins_share": 0.5}
    write_metrics(made["preference_pairs"], {"cells": [{"task": t, "dimension": d, **counts} for t, d in TAXONOMY.cells]})
    write_metrics(made["reward_model"], _judge(rng, "validation"))
    _lines(
        made["reward_model"] / "curve.jsonl", [{"step": s, "loss": 0.7, "accuracy": 0.7 - 0.2 / (1 + s / 30)} for s in range(0, 300, 20)]
    )
    _lines(made["reward_model"] / "accuracy.jsonl", [{"p_winner_first": 0.7}])
    for name, top in [("policy-static", 0.2), ("policy-ema", 0.15)]:
        noise = rng.normal(0, 0.05, 120)
        rows = [{"step": s, "task": "fill", "loss": 0.4, "reward": float(0.5 + top * (1 - np.exp(-s / 30)) + noise[s])} for s in range(120)]
        _lines(made[name] / "curve.jsonl", rows)
    (made["policy-static"] / "checkpoints.jsonl").write_bytes(gzip.decompress((RECORDS / "guardrails_off.jsonl.gz").read_bytes()))
    looks = summary(read_checkpoints(made["policy-static"] / "checkpoints.jsonl"))
    rewarded = {task.name: [name for name in task.dimensions if (task.name, name) not in SILENT] for task in TAXONOMY.active}
    write_metrics(made["policy-static"], {"steps": 60, "best_step": 24, "over_optimised": [36, 48], "rewarded": rewarded, "looks": looks})
    _evaluation(made["evaluation"], made["curated_dataset"], rng)
    write_metrics(made["onnx"], {"relative_error": 3.2e-6})
    write_metrics(made["engine"], {"bytes": 3_100_000, "architectures": [80, 86, 89], "verified": False})
    return made


def _versions(names: Any) -> dict[str, Version]:
    return {name: _version(name, number) for number, name in enumerate(names, start=1)}


def _run(**changed: Any) -> RunFacts:
    stages = {name: 5.0 * (i + 1) for i, name in enumerate(CHAIN)}
    facts: dict[str, Any] = {
        "wall_s": 421.0,
        "peak_rss_gb": 2.31,
        "overhead_share": 0.08,
        "commit": "0123abc",
        "gates": GATES,
        "release": RELEASE,
    }
    return RunFacts(**{**facts, "stage_seconds": stages, "reused": ["source_images"], **changed})


class _Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, the open tags and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


def test_report_json_has_every_key(folders: dict[str, Path], tmp_path: Path) -> None:
    path, _ = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    report = json.loads(path.read_text())
    assert set(report) >= {"wall_s", "peak_rss_gb", "overhead_share", "commit", "judge", "policy", "onnx", "engine", "gates", "release"}
    assert set(report["judge"]) >= {"mean_accuracy", "base_mean_accuracy", "order_consistency", "cells"}
    assert set(report["judge"]["cells"][0]) >= {"task", "dimension", "n", "accuracy", "lo", "hi"}
    for mode in ("static", "ema"):
        assert set(report["policy"][mode]) >= {"mean_win_rate", "preservation_psnr", "tasks", "cells"}
        confirming = {"confirming_win_rate", "confirming_lo", "confirming_hi"}
        counted = {"task", "n", "n_without_truth", "origins"}
        assert set(report["policy"][mode]["tasks"][0]) == counted | {"win_rate", "lo", "hi", "se", "p_worse"} | confirming
        assert set(report["policy"][mode]["judge_on_edits"]["cells"][0]) == {"task", "dimension", "n", "accuracy", "lo", "hi"}
        assert set(report["training"][mode]) == {"steps", "best_step", "over_optimised", "rewarded", "looks"}
        assert set(report["policy"][mode]["cells"][0]) >= {"task", "dimension", "n", "win_rate", "lo", "hi", "judge_win_rate"}
    assert report["onnx"] == {"relative_error": 3.2e-6}
    assert report["engine"] == {"bytes": 3_100_000, "architectures": [80, 86, 89], "verified": False}
    assert set(report["gates"][0]) >= {"name", "measure", "threshold", "passed"}
    assert report["release"] == RELEASE and report["sampling"] == {"steps": 8, "true_cfg": 3.0}
    for name in ("items.jsonl", "judge-pairs.jsonl", "judge-validation.jsonl", "policy-static-curve.jsonl", "policy-ema-curve.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "policy-static-checkpoints.jsonl").exists() and not (tmp_path / "policy-ema-checkpoints.jsonl").exists()


def test_the_page_draws_what_the_judges_said_of_each_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    _, path = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    section = path.read_text().split("While the policy was trained")[1].split("<h2>")[0]
    assert section.count("<figure") == 1 and "<figcaption>static" in section
    assert all(f">{title}</text>" in section for title in ("second judge", "truth", "All tasks", *(task.title for task in TAXONOMY.active)))


def test_the_page_says_which_checkpoint_was_delivered_and_which_cells_gave_no_reward(folders: dict[str, Path], tmp_path: Path) -> None:
    _, path = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    words = " ".join(_Page(path.read_text()).words.split("While the policy was trained")[1].split("Absolute quality")[0].split())
    assert "delivered after 24 iterations" in words and "won 49.6%" in words
    assert "best in hindsight, after 12, won 51.2%" in words
    assert words.count("over-optimised after") == 1 and "static: over-optimised after 36, 48 iterations" in words
    assert "no reward came from Text rendering · text alignment, Text rendering · legibility:" in words


def test_cells_that_are_worse_than_the_base_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation"
    shutil.copytree(folders["evaluation"], evaluation)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    for cell in metrics["policy"]["static"]["cells"]:
        cell["hi"] = 0.49 if (cell["task"], cell["dimension"]) == ("fill", "aesthetics") else 0.5
    for cell in metrics["policy"]["ema"]["cells"]:
        cell["hi"] = 0.5
    write_metrics(evaluation, metrics)
    _, page = write_report(
        tmp_path / "report", folders={**folders, "evaluation": evaluation}, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY
    )
    words = " ".join(_Page(page.read_text()).words.split())
    assert "Worse than the base, static, with the whole interval under one half: Image fill · aesthetics." in words
    assert words.count("Worse than the base") == 1


def test_the_page_says_how_near_photographs_come_to_the_withheld_pixels(folders: dict[str, Path], tmp_path: Path) -> None:
    path, page = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    found = json.loads(path.read_text())["withheld"]["ema"]
    assert (found["n"], found["psnr"], found["base_psnr"], found["win_rate"]) == (4, 19.0, 16.0, 1.0)
    assert "ema 19 dB (base 16), nearer in 100.0%" in " ".join(_Page(page.read_text()).words.split())


def test_the_page_says_what_is_to_be_seen(folders: dict[str, Path], tmp_path: Path) -> None:
    _, page = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    words = " ".join(_Page(page.read_text()).words.split())
    assert set(TOLD) == set(FACTS)
    assert "Factnbaseemastatic Object removal object gone40.0%0 to 60100.0%40 to 100100.0%40 to 100 " in words  # cells without a space


def test_page_is_whole_and_fetches_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    _, path = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    text = path.read_text()
    page = _Page(text)
    assert page.open == []
    assert all(link.startswith(("data:image/", "#")) for link in page.fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len([link for link in page.fetched if link.startswith("data:")]) == 5 * (2 * 5 + 4)  # a photo has no perfect edit to show
    assert "Release v3 is in production" in page.words
    for title in [task.title for task in TAXONOMY.active]:
        assert title in page.words
    assert "never executed" in page.words and "unverified" in page.words
    assert "win rate over the base" in text and "mean P(evaluated is better)" in text


def test_every_headline_figure_says_over_how_much(folders: dict[str, Path], tmp_path: Path) -> None:
    _, page = write_report(tmp_path, folders=folders, versions=_versions(folders), run=_run(), taxonomy=TAXONOMY)
    words = " ".join(_Page(page.read_text()).words.split())
    assert "20 edits of 20 held-out conditions" in words and ", 20 conditions" in words
    assert f"mean over {len(TAXONOMY.cells)} cells, 680 test pairs" in words
    assert "raw output of 25 edits" in words


def test_tasks_without_conditions_or_without_truth_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    items = [item for item in read_items(folders["evaluation"] / "items.jsonl") if item["task"] != "text"]
    items = [item for item in items if item["task"] != "fill" or item["kind"] == "photo"]
    evaluation = tmp_path / "evaluation"
    shutil.copytree(folders["evaluation"], evaluation)
    write_items(evaluation / "items.jsonl", items)
    figures = recompute(items, TAXONOMY, split="test", choose_split="none", tie_tolerance=0.02, resamples=200)
    write_metrics(evaluation, {**figures, "judge": _judge(np.random.default_rng(0), "test")})
    given = {"versions": _versions(folders), "run": _run(), "taxonomy": TAXONOMY}
    path, page = write_report(tmp_path / "report", folders={**folders, "evaluation": evaluation}, **given)
    words = " ".join(_Page(page.read_text()).words.split())
    assert "No condition was tested, so nothing is known, of: Text rendering." in words
    assert "No ground truth was tested for: Image fill." in words
    report = json.loads(path.read_text())
    assert report["not_evaluated"] == ["text"]
    assert [row["task"] for row in report["policy"]["ema"]["tasks"]] == [task.name for task in TAXONOMY.active]


def test_refusal_names_the_gate_and_both_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    failed = {
        "name": "win_rate",
        "measure": 0.481,
        "threshold": 0.55,
        "passed": False,
        "description": "at least: mean win rate over the base",
    }
    reached = {name: folder for name, folder in folders.items() if name not in ("onnx", "engine", "release")}
    tolerated = {**failed, "name": "policy_moved", "measure": 0.0, "artifact": "policy-static"}  # one mode of two: the chain went on
    run = _run(gates=[GATES[0], tolerated, failed], release=None, refused="evaluation_gates: win_rate: measured 0.481, threshold 0.55.")
    path, page = write_report(tmp_path, folders=reached, versions=_versions(reached), run=run, taxonomy=TAXONOMY)
    report = json.loads(path.read_text())
    assert report["release"] is report["onnx"] is report["engine"] is None
    words = " ".join(_Page(page.read_text()).words.split())
    assert "stopped at the gate win_rate" in words
    assert "Measured 0.481, threshold 0.550" in words
    assert "Production has not moved" in words


def test_chain_that_stopped_at_the_data_still_has_a_report(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("of an earlier run\n")
    reached = {name: folders[name] for name in ("source_images", "curated_dataset")}
    failed = {"name": "split_leak", "measure": 3.0, "threshold": 0, "passed": False, "description": "at most: leaked source images"}
    run = _run(gates=[failed], release=None, refused="The split leaks.", stage_seconds={}, reused=[])
    path, page = write_report(tmp_path, folders=reached, versions=_versions(reached), run=run, taxonomy=TAXONOMY)
    report = json.loads(path.read_text())
    assert report["judge"] is report["policy"] is report["onnx"] is report["engine"] is None
    assert not (tmp_path / "items.jsonl").exists()
    assert "split_leak" in _Page(page.read_text()).words


def test_judge_of_a_chain_that_stopped_before_evaluation_is_marked_as_validation(folders: dict[str, Path], tmp_path: Path) -> None:
    reached = {name: folder for name, folder in folders.items() if name not in ("evaluation", "onnx", "engine", "release")}
    path, page = write_report(tmp_path, folders=reached, versions=_versions(reached), run=_run(release=None), taxonomy=TAXONOMY)
    assert json.loads(path.read_text())["judge"]["split"] == "validation"
    assert "sealed test pairs were not asked" in _Page(page.read_text()).words


def test_release_beside_a_failed_mode_claims_no_more_than_is_true(folders: dict[str, Path], tmp_path: Path) -> None:
    failed = {"name": "policy_moved", "measure": 0.0, "threshold": 1e-6, "passed": False, "description": "", "artifact": "policy-static"}
    run = _run(gates=[*GATES, failed], release={**RELEASE, "stage": None})
    _, page = write_report(tmp_path, folders=folders, versions=_versions(folders), run=run, taxonomy=TAXONOMY)
    words = " ".join(_Page(page.read_text()).words.split())
    assert "Release v3 is made, but in no stage yet" in words
    assert "every gate passed" not in words and "A gate stopped one of the modes" in words


def test_an_approval_stands_at_the_head(folders: dict[str, Path], tmp_path: Path) -> None:
    said = "approved by lee: seen by eye (OVERRIDE of evaluation/win_rate)"
    run = _run(release={**RELEASE, "approval": said})
    path, page = write_report(tmp_path, folders=folders, versions=_versions(folders), run=run, taxonomy=TAXONOMY)
    assert said in " ".join(_Page(page.read_text()).words.split()) and json.loads(path.read_text())["release"]["approval"] == said


def test_what_is_not_finite_becomes_null_and_text_is_escaped(folders: dict[str, Path], tmp_path: Path) -> None:
    gate = {"name": "policy_finite", "measure": float("nan"), "threshold": 0.0, "passed": False, "description": "<b>figures</b>"}
    run = _run(gates=[gate], release=None, refused="a < b", overhead_share=float("nan"))
    reached = {"curated_dataset": folders["curated_dataset"]}
    path, page = write_report(tmp_path, folders=reached, versions={}, run=run, taxonomy=TAXONOMY)
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["gates"][0]["measure"] is None
    assert "<b>figures" not in page.read_text()


def test_a_report_that_is_cut_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"versions": _versions(folders), "run": _run(), "taxonomy": TAXONOMY}
    cut = {**folders, "evaluation": tmp_path / "cut"}  # the page cannot be drawn without its pictures
    cut["evaluation"].mkdir()
    (cut["evaluation"] / "metrics.json").write_text((folders["evaluation"] / "metrics.json").read_text())
    (cut["evaluation"] / "items.jsonl").write_text((folders["evaluation"] / "items.jsonl").read_text())
    with pytest.raises(UnknownVersion):
        write_report(tmp_path / "reports" / "1", folders=cut, **given)
    assert not (tmp_path / "reports").exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskFull, match="reports/1"):
            write_report(tmp_path / "reports" / "1", folders=folders, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "reports").iterdir()) == []
    write_report(tmp_path / "reports" / "1", folders=folders, **given)
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["1"]


def test_large_pictures_are_shown_small(folders: dict[str, Path], tmp_path: Path) -> None:
    from ops.report_page import _uri

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8))
    assert len(_uri(noise)) < 100_000
