"""What docs/measures.md says of the measures that need no target is what was measured."""

from __future__ import annotations

import json

from benchmarks.blind_agreement import RESULTS, ROOT, agreement, table
from models.blind import RELIABLE
from models.taxonomy import Taxonomy


def test_the_table_in_the_docs_is_the_committed_result() -> None:
    record = json.loads(RESULTS.read_text())
    assert len(record["rows"]) == 17 and not record["commit"].endswith("+")
    assert table(record["rows"]) in (ROOT / "docs" / "measures.md").read_text()


def test_what_watching_a_policy_rests_on_agrees_with_the_truth_and_the_rest_is_not_sure_to() -> None:
    taxonomy, sure = Taxonomy.load(), 0.7
    asked = [(taxonomy.dimension(row["dimension"]).measured_by, row["measured_by"]) for row in json.loads(RESULTS.read_text())["rows"]]
    low = {name: min(told["lo"] for each, told in asked if each == name and told) for name, told in asked if told}
    assert {name for name, worst in low.items() if worst > sure} == RELIABLE
    assert all(told["lo"] < sure for name, told in asked if told and name not in RELIABLE)


def test_agreement_counts_the_pairs_that_the_truth_tells_apart() -> None:
    truth = [[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]]
    same, opposite, undecided = (
        agreement(scores, truth) for scores in (truth, [[-value for value in row] for row in truth], [[0.0] * 3] * 2)
    )
    assert same and opposite and undecided
    assert [found["mean"] for found in (same, opposite, undecided)] == [1.0, 0.0, 0.5]
    assert [found["pairs"] for found in (same, opposite, undecided)] == [5, 5, 5]  # of six: one is a tie
    assert agreement(truth, [[1.0] * 3] * 2) is None
