"""The classifier of what is to be seen hardly errs."""

from __future__ import annotations

import json

from benchmarks.seen import RESULTS, classifier


def test_the_classifier_sees_what_is_there_and_rarely_what_is_not() -> None:
    told = json.loads(RESULTS.read_text())
    shares = told["classifier"]
    assert not told["commit"].endswith("+") and shares["scenes"] == 600
    assert min(shares[fact] for fact in ("object", "colour", "shape", "word", "gone")) > 0.98
    assert classifier(20) == {"scenes": 20} | dict.fromkeys(("object", "colour", "shape", "word", "gone"), 1.0)
