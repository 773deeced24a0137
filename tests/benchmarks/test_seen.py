"""What docs/measures.md says of what is to be seen is what was measured, and the classifier hardly errs."""

from __future__ import annotations

import json

from benchmarks.seen import RESULTS, ROOT, classifier, table


def test_the_table_in_the_docs_is_the_committed_result() -> None:
    told = json.loads(RESULTS.read_text())
    assert len(told["rows"]) == 3 and not told["commit"].endswith("+")
    assert table(told) in (ROOT / "docs" / "measures.md").read_text()


def test_the_classifier_sees_what_is_there_and_rarely_what_is_not() -> None:
    told = json.loads(RESULTS.read_text())["classifier"]
    assert told["scenes"] == 600 and min(told[fact] for fact in ("object", "colour", "shape", "word", "gone")) > 0.98
    assert classifier(20) == {"scenes": 20} | dict.fromkeys(("object", "colour", "shape", "word", "gone"), 1.0)
