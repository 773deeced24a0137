"""Promotion and rollback over a whole chain in a real registry."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infra.stores.base import ArtifactRef, directory_digest
from infra.stores.dvc import DvcStore
from models.errors import ConfigError, DigestMismatch, GateRefused, StoreError, UnknownVersion
from ops import promote as promotion
from ops.approval import Terms
from ops.gate import NEWER_GATES, REQUIRED_GATES, Gate, GateConfig
from ops.promote import rollback
from tests.ops.promotable import BY, PARENTS, SHIPPED, Refs, approved, chain_of, keys_of, promote, prove, put, release_of


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Refs]:
    """A chain with two releases."""
    home = tmp_path_factory.mktemp("template")
    store = DvcStore(home / "registry")
    refs = chain_of(store, home / "work")
    refs["release"] = release_of(store, home / "work", refs, note="one")
    refs["next"] = release_of(store, home / "work", refs, note="two")
    for version in store.versions():
        store.get(version.ref)  # linked once here instead of once per test
    return store.root.parent, refs


@pytest.fixture
def store(template: tuple[Path, Refs], tmp_path: Path) -> DvcStore:
    shutil.copytree(template[0], tmp_path / "home")
    return DvcStore(tmp_path / "home" / "registry")


@pytest.fixture
def refs(template: tuple[Path, Refs]) -> Refs:
    return template[1]


def refused(store: DvcStore, ref: ArtifactRef, match: str) -> None:
    """Promotion is refused with that message, and production does not move."""
    before = store.moves("release")
    with pytest.raises(GateRefused, match=match):
        promote(store, ref, "production", thresholds=SHIPPED, **BY)
    assert store.moves("release") == before


def test_with_all_evidence_the_stage_moves_and_keeps_the_evidence(store: DvcStore, refs: Refs) -> None:
    move = promote(store, refs["release"], "production", thresholds=SHIPPED, **BY)
    assert store.stage("release", "production") == refs["release"]
    assert (move.approver, move.reason, move.version) == ("kim", "test", 1)
    proven = {store.version(digest).parents[0].name for digest in move.evidence}
    assert proven == set(REQUIRED_GATES) - {"policy-static"}  # the mode that was not chosen needs no health
    assert promote(store, refs["release"], "production", thresholds=SHIPPED, **BY) == move
    assert [move.stage for move in store.moves("release")] == ["candidate", "staging", "production"]


@pytest.mark.parametrize("name", sorted(set(REQUIRED_GATES) - {"policy-static"}))
def test_one_failed_gate_anywhere_above_refuses(store: DvcStore, refs: Refs, name: str) -> None:
    promote(store, refs["release"], "production", thresholds=SHIPPED, **BY)
    gate = REQUIRED_GATES[name][-1]
    prove(store, refs[name], failing=gate)
    refused(store, refs["next"], f"{name} {refs[name].digest[:12]} did not pass {gate}: measured 1")
    assert store.stage("release", "production") == refs["release"]


def test_the_first_failed_gate_of_the_chain_is_named(store: DvcStore, refs: Refs) -> None:
    prove(store, refs["engine"], failing="engine_built")
    prove(store, refs["reward_model"], failing="judge_order")
    refused(store, refs["release"], "judge_order")


def test_evidence_must_be_complete_and_measured(store: DvcStore, refs: Refs) -> None:
    prove(store, refs["onnx"], lacking="onnx_error")
    refused(store, refs["release"], "lacks the gate onnx_error")
    prove(store, refs["onnx"], gates=[Gate(name, None, 0.5, True, "d") for name in REQUIRED_GATES["onnx"]])
    refused(store, refs["release"], "onnx_valid: measured nothing")


def test_evidence_of_laxer_thresholds_is_refused_by_name(store: DvcStore, refs: Refs) -> None:
    lax = GateConfig(min_win_rate=0, max_psnr_drop=9)
    prove(store, refs["evaluation"], thresholds=lax)
    refused(
        store,
        refs["release"],
        f"evidence for evaluation {refs['evaluation'].digest[:12]} was recorded under min_win_rate 0.0 \\(0.55 is in force\\), "
        "max_psnr_drop 9.0 \\(0.5 is in force\\). Run the check of evaluation again",
    )
    promote(store, refs["release"], "staging", thresholds=lax, **BY)  # the owner's choice
    prove(store, refs["evaluation"], thresholds=GateConfig(min_win_rate=0.6))
    promote(store, refs["release"], "production", thresholds=SHIPPED, **BY)


def test_an_earlier_release_is_not_held_against_todays_thresholds(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    """It was promoted under those of its time; what was made with it since has evidence of its own."""
    strict = GateConfig(min_win_rate=0.9)
    again = {name: refs[name] for name in PARENTS if name not in ("evaluation", "onnx", "engine")}
    parents = [*(refs[parent] for parent in PARENTS["evaluation"]), refs["release"]]
    again["evaluation"] = put(store, tmp_path / "work", "evaluation", parents, note="against production")
    prove(store, again["evaluation"], thresholds=strict)
    again = chain_of(store, tmp_path / "work", given=again, note="2")
    ref = release_of(store, tmp_path / "work", again, note="2")
    promote(store, ref, "production", thresholds=strict, **BY)
    with pytest.raises(GateRefused, match=r"min_win_rate 0\.55 \(0\.9 is in force\)"):
        promote(store, refs["release"], "production", thresholds=strict, **BY)


def test_an_earlier_release_answers_for_the_gates_of_its_time(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    again = {name: refs[name] for name in PARENTS if name not in ("evaluation", "onnx", "engine")}
    parents = [*(refs[parent] for parent in PARENTS["evaluation"]), refs["release"]]
    again["evaluation"] = put(store, tmp_path / "work", "evaluation", parents, note="against production")
    prove(store, again["evaluation"])
    ref = release_of(store, tmp_path / "work", chain_of(store, tmp_path / "work", given=again, note="2"), note="2")
    prove(store, refs["evaluation"], lacking="task_lo")
    refused(store, ref, "lacks the gate task_lo")
    for newer in NEWER_GATES:
        prove(store, refs["evaluation"], lacking=newer)  # recorded before there was that gate
        promote(store, ref, "production")
        refused(store, refs["release"], f"lacks the gate {newer}")  # on its own it has to have it


def test_what_a_newer_evaluation_names_has_met_the_other_mode(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    """Measured again, the evaluation may name the other policy. What an older one named has not met the newer's choice."""
    other = {name: refs[name] for name in PARENTS if name not in ("evaluation", "onnx", "engine")}
    prove(store, other["policy-static"])
    parents = [refs[parent] for parent in PARENTS["evaluation"]]
    other["evaluation"] = put(store, tmp_path / "work", "evaluation", parents, mode="static", note="again")
    prove(store, other["evaluation"])
    static = release_of(store, tmp_path / "work", chain_of(store, tmp_path / "work", given=other, note="2"), note="2", mode="static")
    promote(store, refs["release"], "production")
    assert promote(store, static, "production").digest == static.digest
    with pytest.raises(GateRefused, match="measured against another production"):
        promote(store, refs["next"], "production")


def test_a_release_must_have_met_the_production_that_stands(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    """Two releases that were measured while nothing was in production: the second may not replace the first unseen."""
    data = {name: refs[name] for name in ("source_images", "curated_dataset", "candidates", "preference_pairs", "reward_model")}
    other = release_of(store, tmp_path / "work", chain_of(store, tmp_path / "work", given=data, note="2"), note="2")
    promote(store, refs["release"], "production")
    promote(store, refs["next"], "production")  # it holds the same policy
    with pytest.raises(GateRefused, match=rf"another production \(none\) than {refs['next'].digest[:12]}, which stands"):
        promote(store, other, "production")
    assert store.stage("release", "production") == refs["next"]
    third = dict(data)
    for name in ("policy-static", "policy-ema"):
        third[name] = put(store, tmp_path / "work", name, [refs[parent] for parent in PARENTS[name]], note="3")
        prove(store, third[name])
    measured = [*(third[parent] for parent in PARENTS["evaluation"]), refs["release"]]  # another release of the policy that stands
    third["evaluation"] = put(store, tmp_path / "work", "evaluation", measured, note="3")
    prove(store, third["evaluation"])
    met = release_of(store, tmp_path / "work", chain_of(store, tmp_path / "work", given=third, note="3"), note="3")
    assert promote(store, met, "production").digest == met.digest
    approved(store, other, overrides=("evaluation/not_below_production",))
    assert promote(store, other, "production").digest == other.digest


def test_evidence_for_another_digest_is_none(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    other = put(store, tmp_path / "work", "engine", [refs["onnx"]], note="another engine, never checked")
    ref = release_of(store, tmp_path / "work", refs | {"engine": other}, note="three")
    refused(store, ref, f"no evidence for engine {other.digest[:12]}")


@pytest.mark.parametrize("name", ["gates-evaluation", "onnx", "source_images"])
def test_altered_bytes_of_evidence_or_artifact_refuse(store: DvcStore, refs: Refs, name: str) -> None:
    ref = store.versions(name)[-1].ref
    path = next(path for path in store.get(ref).rglob("*.json"))
    copies = [p for p in store.root.rglob("*") if p.is_file() and ".git/" not in str(p) and p.read_bytes() == path.read_bytes()]
    assert len(copies) >= 2  # the checkout and DVC's cache
    for copy in copies:
        copy.chmod(0o644)
        copy.write_text(copy.read_text().replace("false", "true").replace('"note": ""', '"note": "x"') + " ")
    refused(store, refs["release"], "damaged")


def test_a_release_must_rest_on_the_whole_chain(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    refused(store, release_of(store, tmp_path / "work", refs, note="x", leave_out="engine"), "not made from any engine")
    refused(store, put(store, tmp_path / "work", "release", [], mode="ema"), "not made from any curated_dataset")
    refused(store, put(store, tmp_path / "work", "release", [refs["engine"]], mode="other"), "which policy")
    refused(store, release_of(store, tmp_path / "work", refs, note="y", mode="static"), "policy_preserved")


def test_what_was_evaluated_must_be_what_is_released(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    prove(store, refs["policy-static"])
    refused(store, release_of(store, tmp_path / "work", refs, note="x", mode="static"), "about policy-ema")
    other = put(store, tmp_path / "work", "policy-ema", [refs["reward_model"]], note="trained longer, never evaluated")
    prove(store, other)
    refused(store, release_of(store, tmp_path / "work", refs | {"policy-ema": other}, note="y"), "mixes 2 versions")


@pytest.mark.parametrize("name", ["curated_dataset", "candidates", "preference_pairs", "reward_model"])
def test_members_made_from_different_versions_are_refused(store: DvcStore, refs: Refs, tmp_path: Path, name: str) -> None:
    """The evaluation was made from another version than the policy: its test images may be the policy's training images."""
    work = tmp_path / "work"
    other = put(store, work, name, [refs[parent] for parent in PARENTS[name]], note="2")
    evaluation = put(store, work, "evaluation", [(refs | {name: other})[parent] for parent in PARENTS["evaluation"]], note="2")
    onnx = put(store, work, "onnx", [refs["policy-ema"], evaluation], note="2")
    engine = put(store, work, "engine", [onnx], note="2")
    for ref in (other, evaluation, onnx, engine):
        if ref.name in REQUIRED_GATES:
            prove(store, ref)
    digests = " and ".join(sorted(ref.digest[:12] for ref in (refs[name], other)))
    ref = release_of(store, work, refs | {"evaluation": evaluation, "onnx": onnx, "engine": engine}, note="2")
    refused(store, ref, f"mixes 2 versions of {name}: {digests}")


def test_an_earlier_release_in_the_lineage_counts_by_its_own_mode(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    work = tmp_path / "work"
    made = {"curated_dataset": refs["curated_dataset"]}
    made["candidates"] = put(store, work, "candidates", [refs["curated_dataset"], refs["release"]], note="2")
    made["preference_pairs"] = put(store, work, "preference_pairs", [made["candidates"]], note="2")
    made["reward_model"] = put(store, work, "reward_model", [made["preference_pairs"]], note="2")
    made["policy-static"] = put(store, work, "policy-static", [made["preference_pairs"], made["reward_model"]], note="2")
    made["policy-ema"] = put(store, work, "policy-ema", [made["preference_pairs"], made["reward_model"]], note="2")
    made["evaluation"] = put(store, work, "evaluation", [made["policy-static"], made["policy-ema"]], mode="static", note="2")
    made["onnx"] = put(store, work, "onnx", [made["policy-static"]], note="2")
    made["engine"] = put(store, work, "engine", [made["onnx"]], note="2")
    for name in set(made) - {"curated_dataset", "candidates", "policy-ema"}:
        prove(store, made[name])
    ref = release_of(store, work, made, note="second generation", mode="static")
    promote(store, ref, "production", thresholds=SHIPPED, **BY)
    prove(store, refs["policy-ema"], failing="policy_moved")  # what the first generation held
    refused(store, replace(refs["next"]), "policy_moved")
    shutil.rmtree(store.root / "checkouts")
    assert directory_digest(store.get(ref))[0] == ref.digest


@pytest.mark.parametrize("name", ["source_images", "policy-ema", "evaluation"])
def test_what_is_no_release_is_refused(store: DvcStore, refs: Refs, name: str) -> None:
    """However well its gates speak for it: a stage is a place of releases."""
    with pytest.raises(ConfigError, match=f"{name} {refs[name].digest[:12]} is no release.*`onereward versions release`"):
        promote(store, refs[name], "staging", thresholds=SHIPPED, **BY)
    assert store.moves(name) == []


def test_a_release_the_store_does_not_hold_is_named(store: DvcStore) -> None:
    with pytest.raises(UnknownVersion):
        promote(store, ArtifactRef("release", "0" * 64, "", 0), "staging", thresholds=SHIPPED, **BY)


def test_a_move_needs_a_stage_an_approver_and_a_reason(store: DvcStore, refs: Refs) -> None:
    for stage, words in [("prod", BY), ("production", BY | {"approver": " "}), ("production", BY | {"reason": ""})]:
        with pytest.raises(ConfigError):
            promote(store, refs["release"], stage, thresholds=SHIPPED, **words)
        with pytest.raises(ConfigError):
            rollback(store, keys_of(store), "release", stage, **words)
    assert store.moves("release") == []


def test_rollback_restores_the_exact_bytes_as_a_new_move(store: DvcStore, refs: Refs) -> None:
    first = promote(store, refs["release"], "production", thresholds=SHIPPED, **BY)
    promote(store, refs["next"], "production", thresholds=SHIPPED, **BY)
    move = rollback(store, keys_of(store), "release", "production", approver="lee", reason="complaints")
    assert (move.digest, move.counter, move.approver, move.evidence) == (first.digest, 7, "lee", first.evidence)
    current = store.stage("release", "production")
    assert current == refs["release"] and directory_digest(store.get(current))[0] == refs["release"].digest
    with pytest.raises(UnknownVersion, match="no earlier version"):
        rollback(store, keys_of(store), "release", "production", **BY)  # and not back to the version that was left
    promote(store, refs["next"], "production", thresholds=SHIPPED, **BY)
    assert store.stage("release", "production") == refs["next"] and len(store.moves("release", "production")) == 4


def test_repeated_rollback_goes_further_back(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    third = release_of(store, tmp_path / "work", refs, note="three")
    for ref in (refs["release"], refs["next"], third):
        promote(store, ref, "production", thresholds=SHIPPED, **BY)
    digests = [rollback(store, keys_of(store), "release", "production", **BY).digest for _ in range(2)]
    assert digests == [refs["next"].digest, refs["release"].digest]


def test_rollback_to_damaged_bytes_is_refused(store: DvcStore, refs: Refs) -> None:
    promote(store, refs["release"], "production", thresholds=SHIPPED, **BY)
    promote(store, refs["next"], "production", thresholds=SHIPPED, **BY)
    path = store.get(refs["release"]) / "metrics.json"
    content = path.read_bytes()
    for copy in [p for p in store.root.rglob("*") if p.is_file() and ".git/" not in str(p) and p.read_bytes() == content]:
        copy.chmod(0o644)
        copy.write_text("{}")
    with pytest.raises(DigestMismatch):
        rollback(store, keys_of(store), "release", "production", **BY)
    assert store.stage("release", "production") == refs["next"]


def test_a_release_moves_one_stage_at_a_time(store: DvcStore, refs: Refs) -> None:
    """From where it stands now: what has stood there once and was replaced goes through it again."""
    rules = {"thresholds": SHIPPED, "terms": Terms(), **BY}
    keys = keys_of(store)
    for stage, needed in (("production", "staging"), ("staging", "candidate")):
        with pytest.raises(GateRefused, match=f"is not in {needed}, .* `onereward promote {refs['release'].digest[:12]} {needed}`"):
            promotion.promote(store, keys, refs["release"], stage, **rules)
    promote(store, refs["release"], "staging")
    promote(store, refs["next"], "staging")
    with pytest.raises(GateRefused, match="is not in staging"):
        promotion.promote(store, keys, refs["release"], "production", **rules)
    assert promotion.promote(store, keys, refs["next"], "production", **rules).counter == 5


def test_of_two_who_promote_at_once_the_second_is_told(store: DvcStore, refs: Refs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one moves the stage while this one's evidence is being verified."""
    promote(store, refs["release"], "staging")
    verify = promotion.verify

    def meanwhile(*arguments: object) -> object:
        monkeypatch.setattr(promotion, "verify", verify)
        promote(DvcStore(store.root), refs["release"], "production")
        return verify(*arguments)

    monkeypatch.setattr(promotion, "verify", meanwhile)
    with pytest.raises(StoreError, match="moved production of release meanwhile"):
        promote(store, refs["release"], "production")
    assert [move.stage for move in store.moves("release")] == ["candidate", "staging", "production"]
    assert promote(store, refs["release"], "production") == store.moves("release")[-1]  # said again, it is done already


def test_an_unsigned_release_is_refused(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    folder = tmp_path / "unsigned"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"best_mode": "ema"}')
    ref = store.put(
        "release", folder, parents=[refs[name] for name in ("policy-ema", "evaluation", "onnx", "engine")], metadata={"mode": "ema"}
    )
    refused(store, ref, "release .* is damaged: release .* is not signed")


TERMS = Terms(require_approval=True, licence="flux-1-dev-non-commercial-license")


def parity_of(tmp_path: Path, engine: str, error: float) -> Path:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps({"engine": engine, "relative_error": error, "device": "a GPU"}))
    return path


def test_a_preset_with_terms_holds_a_release_in_staging(store: DvcStore, refs: Refs, tmp_path: Path) -> None:
    measured = [Gate(name, float(name != "engine_verified"), 0, True, "d") for name in REQUIRED_GATES["engine"]]
    prove(store, refs["engine"], gates=measured)  # built and never executed
    ref = refs["release"]
    assert promote(store, ref, "staging", terms=TERMS).stage == "staging"

    def held(*asked: str) -> None:
        with pytest.raises(GateRefused, match="stays in staging") as raised:
            promote(store, ref, "production", terms=TERMS)
        for words in ("an approval", "licence, flux-1-dev", "engine parity report"):
            assert (words in raised.value.what) == (words in asked)
        assert f"onereward approve {ref.digest[:12]}" in raised.value.remedy

    held("an approval", "licence, flux-1-dev", "engine parity report")
    approved(store, ref)
    held("licence, flux-1-dev", "engine parity report")
    approved(store, ref, licence=TERMS.licence)
    held("engine parity report")
    for engine, error, why in (("0" * 64, 0.001, "does not hold"), (refs["engine"].digest, 0.9, "off by 0.9")):
        with pytest.raises(ConfigError, match=why):
            approved(store, ref, parity=parity_of(tmp_path, engine, error))
    record = approved(store, ref, licence=TERMS.licence, parity=parity_of(tmp_path, refs["engine"].digest, 0.001))
    move = promote(store, ref, "production", terms=TERMS)
    assert record.ref.digest in move.evidence
    assert [entry.stage for entry in store.moves("release")] == ["candidate", "staging", "approved", "approved", "approved", "production"]
    with pytest.raises(GateRefused, match="an approval"):  # one release's approval is not another's
        promote(store, refs["next"], "production", terms=TERMS)


def test_an_override_is_an_approval_that_names_the_gate(store: DvcStore, refs: Refs) -> None:
    ref = refs["release"]
    prove(store, refs["evaluation"], failing="win_rate")
    refused(store, ref, "did not pass win_rate")
    with pytest.raises(ConfigError, match="'evaluation/win'"):
        approved(store, ref, overrides=("evaluation/win",))
    approved(store, ref, overrides=("evaluation/task_lo",))
    refused(store, ref, "did not pass win_rate")
    record = approved(store, ref, overrides=("evaluation/win_rate",))
    assert str(record) == "approved by lee: seen by eye (OVERRIDE of evaluation/win_rate)"
    assert store.moves("release")[-1].reason == str(record) and store.moves("release")[-1].evidence == (record.ref.digest,)
    assert promote(store, ref, "production").digest == ref.digest
    refused(store, refs["next"], "did not pass win_rate")
    prove(store, refs["evaluation"], lacking="win_rate")  # evidence that is absent is not overridden
    with pytest.raises(GateRefused, match="lacks the gate win_rate"):
        promotion.verify(store, keys_of(store), ref, SHIPPED)
