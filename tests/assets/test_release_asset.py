"""The release stage in a real registry: when it makes nothing, and when it leaves production to a person. The op itself is a small one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assets.common import Work, make
from assets.release import release
from assets.settings import Settings
from infra.progress import Progress
from infra.stores.dvc import DvcStore
from infra.workspace import Workspace
from models.errors import GateRefused
from models.taxonomy import Taxonomy
from ops.folders import write_metrics
from ops.gate import GateConfig
from ops.promote import rollback
from ops.release import ReleaseConfig
from tests.ops.promotable import BY, PARENTS, SHIPPED, Refs, chain_of, keys_of, promote, prove, put, release_of

Run = Callable[..., tuple[bool, dict[str, Any]]]


def _assemble(work: Work) -> dict[str, Any]:
    digests = {name: ref.digest for name, ref in work.refs.items()}
    metrics = {"mode": "ema", "title": work.config.title, "made_from": digests}
    write_metrics(work.out, metrics)
    return metrics


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Refs]:
    home = tmp_path_factory.mktemp("template")
    store = DvcStore(home / "registry")
    return home, chain_of(store, home / "work")


@pytest.fixture
def store(template: tuple[Path, Refs], tmp_path: Path) -> DvcStore:
    shutil.copytree(template[0], tmp_path / "home")
    return DvcStore(tmp_path / "home" / "registry")


@pytest.fixture
def refs(template: tuple[Path, Refs]) -> Refs:
    return template[1]


@pytest.fixture
def run(store: DvcStore, tmp_path: Path) -> Run:
    def execute(
        refs: Refs, *, auto_promote: bool = True, gates: dict[str, Any] | None = None, **config: Any
    ) -> tuple[bool, dict[str, Any]]:
        """One run of the stage: was the version there already, and how it ended."""
        settings = Settings(preset="test", flux="none", judge="none", auto_promote=auto_promote, gates=gates or {})
        work = Work(
            stage=replace(release, work=_assemble, models=()),
            config=ReleaseConfig(**config),
            settings=settings,
            workspace=Workspace(tmp_path / "home"),
            store=store,
            taxonomy=Taxonomy.load(),
            progress=Progress(lambda line: None),
            refs={name: refs[name] for name in ("policy-static", "policy-ema", "evaluation", "onnx", "engine")},
            out=tmp_path,
            scratch=tmp_path,
            run_id="run",
            pin=lambda stage: store.stage("release", stage),
        )
        made = make(work)
        assert release.finish is not None
        return made.reused, release.finish(work, made)

    return execute


def production(store: DvcStore) -> str:
    ref = store.stage("release", "production")
    assert ref is not None
    return ref.digest


def test_production_stands_only_where_it_is_what_would_be_made(store: DvcStore, refs: Refs, run: Run, tmp_path: Path) -> None:
    assert run(refs)[1]["ending"] == "promoted"
    reused, ended = run(refs)
    assert reused and ended["ending"] == "unchanged"

    def is_made_anew(refs: Refs, **config: Any) -> None:
        before = production(store)
        reused, ended = run(refs, **config)
        assert not reused and ended["ending"] == "promoted" and production(store) != before

    is_made_anew(refs, title="Another title")
    for name in ("engine", "onnx", "evaluation"):
        ref = put(store, tmp_path / "work", name, [refs[parent] for parent in PARENTS[name]], note="again")
        prove(store, ref)
        refs = refs | {name: ref}
        is_made_anew(refs, title="Another title")


def test_equal_keys_mean_equal_cards(store: DvcStore, refs: Refs, run: Run) -> None:
    """The card lists the gates, so evidence that was recorded anew makes another release."""
    assert not run(refs, auto_promote=False)[0] and run(refs, auto_promote=False)[0]
    prove(store, refs["evaluation"], thresholds=GateConfig(min_win_rate=0.6))
    assert not run(refs, auto_promote=False)[0] and run(refs, auto_promote=False)[0]


def test_a_preset_promotes_under_its_own_thresholds(store: DvcStore, refs: Refs, run: Run) -> None:
    prove(store, refs["evaluation"], thresholds=GateConfig(min_win_rate=0.1))
    with pytest.raises(GateRefused, match=r"evaluation .* min_win_rate 0\.1"):
        run(refs)
    assert store.stage("release", "production") is None
    assert run(refs, gates={"min_win_rate": 0.05})[1]["ending"] == "promoted"


def test_a_run_does_not_undo_a_rollback(store: DvcStore, refs: Refs, run: Run, tmp_path: Path) -> None:
    first = release_of(store, tmp_path / "work", refs, note="one")
    promote(store, first, "production", thresholds=SHIPPED, **BY)
    assert run(refs)[1]["ending"] == "promoted"
    second = production(store)
    rollback(store, keys_of(store), "release", "production", approver="lee", reason="complaints about extend")

    moves = store.moves("release")
    reused, ended = run(refs)
    assert reused and ended["ending"] == "refused" and store.moves("release") == moves and production(store) == first.digest
    for part in ("lee", "release v1", "complaints about extend", f"onereward promote {second[:12]} production"):
        assert part in ended["message"]
    assert run(refs, auto_promote=False)[1]["ending"] == "released" and production(store) == first.digest

    promote(store, store.version(second).ref, "production", thresholds=SHIPPED, **BY)
    assert run(refs)[1]["ending"] == "unchanged"


def test_nor_by_another_release_of_the_policy_that_was_rolled_back(store: DvcStore, refs: Refs, run: Run, tmp_path: Path) -> None:
    assert run(refs)[1]["ending"] == "promoted"
    data = {name: refs[name] for name in ("source_images", "curated_dataset", "candidates", "preference_pairs", "reward_model")}
    better = chain_of(store, tmp_path / "work", given=data, note="trained longer", rival=store.stage("release", "production"))
    assert run(better)[1]["ending"] == "promoted"
    rollback(store, keys_of(store), "release", "production", approver="lee", reason="complaints")

    moves = store.moves("release")
    evaluated = {name: better[name] for name in (*data, "policy-static", "policy-ema")}
    evaluated = chain_of(store, tmp_path / "work", given=evaluated, note="against another production")
    reused, ended = run(evaluated)
    assert not reused and ended["ending"] == "refused" and "lee" in ended["message"] and store.moves("release") == moves

    newest = chain_of(store, tmp_path / "work", given=data, note="trained otherwise", rival=store.stage("release", "production"))
    assert run(newest)[1]["ending"] == "promoted"


def test_nor_does_it_put_an_earlier_round_back(store: DvcStore, refs: Refs, run: Run, tmp_path: Path) -> None:
    assert run(refs)[1]["ending"] == "promoted"
    first, data = store.version(production(store)).ref, {name: refs[name] for name in ("source_images", "curated_dataset")}
    work = tmp_path / "work"
    note = "second round"
    for name in ("candidates", "preference_pairs", "reward_model"):
        data[name] = put(store, work, name, [data[above] for above in PARENTS[name]], note=note)
    data["policy-ema"] = put(store, work, "policy-ema", [data["curated_dataset"], data["reward_model"], first], note=note)
    for name in ("preference_pairs", "reward_model", "policy-ema"):
        prove(store, data[name])
    assert run(chain_of(store, work, given=data, note=note, rival=first))[1]["ending"] == "promoted"

    moves = store.moves("release")
    earlier = {name: refs[name] for name in refs if name not in ("evaluation", "onnx", "engine")}
    ended = run(chain_of(store, work, given=earlier, note="against the second round"))[1]
    assert ended["ending"] == "refused" and "release v2, in production, went on from what it holds" in ended["message"]
    assert store.moves("release") == moves
