"""Candidates by an earlier release: what a stage points to when the run begins, or the one of a digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.candidates import candidates
from assets.common import Work
from assets.curated_dataset import curated_dataset
from assets.refs import materialised
from infra.data import weights_digest
from infra.stores.base import ArtifactRef, ArtifactStore
from models.records import Candidate, read_rows
from tests.pipelines.conftest import Finished
from tests.pipelines.test_interruptions import Chain, opened

pytestmark = pytest.mark.chain


def another_release(store: ArtifactStore, ref: ArtifactRef, folder: Path) -> ArtifactRef:
    """One more version of the release, with other bytes in its pipeline's folder."""
    shutil.copytree(store.get(ref), folder, copy_function=shutil.copyfile)
    (folder / "model" / "NOTE").write_text("another")
    version = store.version(ref.digest)
    return store.put(ref.name, folder, key="another", parents=version.parents, metadata=version.metadata)


def sampled(chain: Chain, policy: str, meanwhile: Any = lambda work: {}) -> tuple[ArtifactRef, set[str]]:
    """Candidates of `policy`, in a run whose first stage, made anew where it does `meanwhile`, comes before them: the release they
    were made with, and the digests of the models in their rows."""

    def curate(work: Work) -> dict[str, Any]:
        meanwhile(work)
        return curated_dataset.work(work)

    sections = {**chain.settings.stages, "candidates": {**chain.settings.stages["candidates"], "policy": policy, "base_share": 0.0}}
    settings = chain.settings.model_copy(update={"stages": sections})
    stages = (replace(curated_dataset, work=curate), candidates)
    result = dg.materialize([stage.build(settings) for stage in stages], instance=chain.instance)
    ref = materialised(chain.instance, candidates.name, result.run_id)[candidates.name]
    (release,) = (parent for parent in chain.store.version(ref.digest).parents if parent.name == "release")
    return release, {row.model_digest for row in read_rows(chain.store.get(ref) / "candidates.jsonl", Candidate)}


def test_a_stage_is_resolved_when_the_run_begins(finished: Finished, tmp_path: Path) -> None:
    with opened(finished, tmp_path) as chain:
        first = chain.store.stage("release", "production")
        assert first is not None
        second = another_release(chain.store, first, tmp_path / "another")
        digests = {ref: weights_digest(chain.store.get(ref) / "model", tmp_path / "digests") for ref in (first, second)}
        assert digests[first] != digests[second]

        def promote(work: Work) -> None:
            work.store.assign(second, "production", approver="kim", reason="test", evidence=[])

        assert sampled(chain, "production", promote) == (first, {digests[first]})
        assert chain.store.stage("release", "production") == second
        assert sampled(chain, "production") == (second, {digests[second]})
        assert sampled(chain, first.digest[:12]) == (first, {digests[first]})
