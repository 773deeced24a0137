"""Gate reports in a real registry: the newest counts, and none that is forged, about something else or laxer."""

import json
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from infra.stores.base import ArtifactRef
from infra.stores.dvc import DvcStore
from models.errors import DiskFull, GateRefused, SignatureRefused
from ops.gate import SIGNATURE, Gate, GateConfig, evidence_for, record_evidence
from tests.ops.promotable import keys_of
from tests.ops.sound import GOOD, artifact

GATES = [Gate("onnx_valid", 1, 1, True, "d"), Gate("onnx_error", 1e-4, 1e-3, True, "d")]
FAILED = [GATES[0], Gate("onnx_error", None, 1e-3, False, "d")]


@pytest.fixture
def store(tmp_path: Path) -> DvcStore:
    return DvcStore(tmp_path / "registry")


def record(store: DvcStore, ref: ArtifactRef, gates: list[Gate], config: GateConfig, tmp: Path) -> ArtifactRef:
    return record_evidence(
        store, keys_of(store), ref, gates, config, code_version="5c", not_verified=["Nobody looked."], run_id="r", tmp=tmp
    )


def test_the_newest_evidence_counts(store: DvcStore, tmp_path: Path) -> None:
    config = GateConfig()
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    assert evidence_for(store, keys_of(store), ref) is None
    first = record(store, ref, GATES, config, tmp_path)
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and evidence.passed and evidence.gates == tuple(GATES) and evidence.ref == first
    assert store.version(first.digest).parents == (ref,) and first.name == "gates-onnx"
    assert record(store, ref, GATES, config, tmp_path) == first and len(store.versions("gates-onnx")) == 1
    record(store, ref, FAILED, config, tmp_path)
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and not evidence.passed and evidence.gates == tuple(FAILED)
    record(store, ref, GATES, config, tmp_path)  # the bytes of run-1's report again, yet the newest
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and evidence.passed
    record(store, ref, GATES[:1], config, tmp_path)
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and not evidence.passed and evidence.missing == ("onnx_error",)


def test_evidence_is_drafted_where_the_caller_says(store: DvcStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    record(store, ref, GATES, GateConfig(), drafts)
    assert evidence_for(store, keys_of(store), ref) is not None and not list(drafts.iterdir())


def test_a_disk_too_full_for_evidence_is_told(store: DvcStore, tmp_path: Path) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    keys_of(store).create()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(DiskFull, match="gate report of onnx"):
            record(store, ref, GATES, GateConfig(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert evidence_for(store, keys_of(store), ref) is None


@pytest.mark.parametrize(("recorded", "lax"), [(0.001, []), (0.0001, []), (0.01, ["max_onnx_error 0.01 (0.001 is in force)"])])
def test_laxer_evidence_says_which_threshold(store: DvcStore, tmp_path: Path, recorded: float, lax: list[str]) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    record(store, ref, GATES, GateConfig(max_onnx_error=recorded, min_win_rate=0), tmp_path)
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and evidence.laxer_than(GateConfig()) == lax


def test_a_report_about_another_version_is_refused(store: DvcStore, tmp_path: Path) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    for number, report in enumerate([{"subject": {"name": "onnx", "digest": "0" * 64}, "gates": []}, {"gates": []}, []]):
        folder = tmp_path / f"forged-{number}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
        store.put("gates-onnx", folder, parents=[ref], metadata={SIGNATURE: keys_of(store).sign_folder(folder)})
        with pytest.raises(GateRefused):
            evidence_for(store, keys_of(store), ref)


def test_a_gate_report_says_what_it_rests_on(store: DvcStore, tmp_path: Path) -> None:
    data = store.put("curated_dataset", artifact(tmp_path / "data", "onnx", {"rows": 3}))
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]), parents=[data])
    gates = [Gate("onnx_valid", 1, 1, True, "d"), Gate("onnx_error", 1e-4, 1e-3, True, "d", interval=(5e-5, 2e-4), n=30)]
    report = json.loads((store.get(record(store, ref, [*gates, FAILED[-1]], GateConfig(), tmp_path)) / "report.json").read_text())
    assert report["subject"] == {"name": "onnx", "digest": ref.digest} and report["lineage"] == {"curated_dataset 1": data.digest}
    assert report["gates"][1]["interval"] == [5e-5, 2e-4] and report["gates"][1]["n"] == 30 and report["code_version"] == "5c"
    assert report["not_verified"] == ["Nobody looked.", "onnx_error: no figure was measured."]
    evidence = evidence_for(store, keys_of(store), ref)
    assert evidence is not None and evidence.gates[1] == gates[1]


def test_evidence_that_no_trusted_key_signed_is_refused(store: DvcStore, tmp_path: Path) -> None:
    ref = store.put("onnx", artifact(tmp_path / "a", "onnx", GOOD["onnx"]))
    good = record(store, ref, GATES, GateConfig(), tmp_path)
    signature = store.version(good.digest).metadata[SIGNATURE]
    folder = tmp_path / "forged"
    folder.mkdir()
    (folder / "report.json").write_text((store.get(good) / "report.json").read_text().replace("5c", "5d"))
    for count, (bundle, why) in enumerate([("", "is not signed"), (signature, "Hash mismatch for 'report.json'"), ("{}", "does not hold")]):
        store.put("gates-onnx", folder, key=str(count), parents=[ref], metadata={SIGNATURE: bundle})
        with pytest.raises(SignatureRefused, match=why):
            evidence_for(store, keys_of(store), ref)
    record(store, ref, GATES, GateConfig(), tmp_path)
    shutil.rmtree(keys_of(store).folder / "trusted")
    with pytest.raises(SignatureRefused, match="not trusted here"):
        evidence_for(store, keys_of(store), ref)
