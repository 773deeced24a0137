"""The sensor counts new human labels from its cursor on, and asks once."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from infra.labels import LabelStore
from infra.workspace import Workspace
from models.records import Preference
from pipelines.jobs import ALL_MODES
from pipelines.sensors import enough_new_labels


def add(labels: LabelStore, start: int, count: int, source: str = "import") -> None:
    rows = [
        Preference(condition_id=f"c{n}", dimension="structure", annotator="kim", source=source, shown=["a", "b"], best="a", worst="b")
        for n in range(start, start + count)
    ]
    labels.add(rows, "0" * 64)


def tick(instance: dg.DagsterInstance, cursor: str | None) -> tuple[list[dg.RunRequest], str | None]:
    with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
        data = enough_new_labels(after=3).evaluate_tick(context)
    return list(data.run_requests), data.cursor


def test_retraining_starts_after_enough_new_labels_and_once(home: Path, instance: dg.DagsterInstance) -> None:
    labels = LabelStore(Workspace.from_env(home).labels_url)
    add(labels, 0, 2)
    requests, cursor = tick(instance, None)
    assert requests == [] and not cursor

    add(labels, 2, 1)
    requests, cursor = tick(instance, cursor)
    assert [request.run_key for request in requests] == ["labels-3"] and cursor == "3"
    assert ALL_MODES.items() <= requests[0].tags.items()
    assert tick(instance, None)[0][0].run_key == "labels-3"  # the same state gives the same key: Dagster starts it once

    add(labels, 3, 2)
    assert tick(instance, cursor) == ([], "3")
    add(labels, 5, 1)
    assert [request.run_key for request in tick(instance, cursor)[0]] == ["labels-6"]


def test_the_scripted_annotator_does_not_count(home: Path, instance: dg.DagsterInstance) -> None:
    add(LabelStore(Workspace.from_env(home).labels_url), 0, 10, source="scripted")
    assert tick(instance, None)[0] == []
