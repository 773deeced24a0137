"""What docs/measures.md says of what is to be seen is what was measured, and the classifier hardly errs."""

from __future__ import annotations

import json

from benchmarks.seen import RESULTS, ROOT, classifier, differences, table
from models.taxonomy import Taxonomy
from ops.win_rates import Item
from tests.ops.test_win_rates import _item

TAXONOMY = Taxonomy.load()


def test_the_table_in_the_docs_is_the_committed_result() -> None:
    told = json.loads(RESULTS.read_text())
    assert len(told["rows"]) == 3 and not told["commit"].endswith("+")
    assert table(told) in (ROOT / "docs" / "measures.md").read_text()


def test_the_classifier_sees_what_is_there_and_rarely_what_is_not() -> None:
    told = json.loads(RESULTS.read_text())["classifier"]
    assert told["scenes"] == 600 and min(told[fact] for fact in ("object", "colour", "shape", "word", "gone")) > 0.98
    assert classifier(20) == {"scenes": 20} | dict.fromkeys(("object", "colour", "shape", "word", "gone"), 1.0)


def test_differences_are_of_the_same_request_in_the_same_home() -> None:
    def home(base: str, mode: str) -> list[Item]:
        policies = {"base": base, "static": mode}
        return [_item(policy, str(n), 0.0 if there == "1" else -1.0) for policy, all_ in policies.items() for n, there in enumerate(all_)]

    (found,) = differences({"a": home("0011", "0111"), "b": home("1100", "0111")}, "static", TAXONOMY)
    assert (found["task"], found["fact"], found["n"], found["mean"]) == ("remove", "gone", 8, 0.25)  # (1 + 2 - 1) / 8
    assert found["lo"] < 0 < 0.25 < found["hi"]
