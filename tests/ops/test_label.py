"""Labels by the scripted annotator and by people."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.labels import LabelStore
from infra.progress import Progress
from models.errors import BadLabel, BadManifest, NotEnoughData, OneRewardError
from models.records import Candidate, Condition, Preference, read_rows, write_rows
from models.shards import ShardReader, ShardWriter
from models.taxonomy import Taxonomy
from ops.curate import CurateConfig, curate
from ops.label import LabelConfig, export_labels, import_labels, imported, label_scripted, record_scripted
from ops.source import SourceConfig, source_images

DIGEST = "d" * 64
LEVELS = (12, 0, 50, 100)  # how far each candidate is from the perfect edit
TAXONOMY = Taxonomy.load()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A curated dataset and four candidates per condition whose order of merit is known; one condition has equal candidates."""
    root = tmp_path_factory.mktemp("made")
    for name in ("sources", "curated", "candidates"):
        (root / name).mkdir()
    source_images(SourceConfig(n_scenes=20, crops_per_photo=0), root / "sources", Progress())
    counts = {"train_per_task": 4, "validation_per_task": 1, "test_per_task": 1}
    curate(CurateConfig(**counts), root / "sources", root / "curated", Progress(), lambda images: images.flatten(1))
    shards, rows = ShardReader(root / "curated"), []
    with ShardWriter(root / "candidates") as written:
        for number, condition in enumerate(conditions(root)):
            target = np.asarray(shards[f"{condition.id}.target"], np.float32)
            rng = np.random.default_rng(number)
            for index, level in enumerate(LEVELS):
                error = 0 if number == 0 else rng.normal(0, level + 1e-9, target.shape)
                written.add(f"{condition.id}.{index}", Image.fromarray((target + error).clip(0, 255).astype(np.uint8)))
                rows.append(candidate(condition.id, index))
    write_rows(root / "candidates" / "candidates.jsonl", rows)
    return root


def conditions(root: Path) -> list[Condition]:
    return read_rows(root / "curated" / "conditions.jsonl", Condition)


def candidate(condition_id: str, index: int) -> Candidate:
    drawn = {"seed": index, "steps": 4, "negative_prompt": "", "true_cfg": 1.0, "guidance_scale": 1.0, "strength": 1.0}
    return Candidate(id=f"{condition_id}.{index}", condition_id=condition_id, index=index, scheduler="euler", model_digest="0", **drawn)


@pytest.fixture
def labels(tmp_path) -> LabelStore:
    return LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")


def label(made: Path, labels: LabelStore, out: Path, digest: str = DIGEST, **values) -> tuple[list[Preference], dict]:
    out.mkdir()
    config = LabelConfig(**{"error_rate": 0.0, **values})
    metrics = label_scripted(config, made / "curated", made / "candidates", imported(labels, digest), TAXONOMY, out, Progress())
    record_scripted(out, labels, digest)
    return read_rows(out / "preferences.jsonl", Preference), metrics


def test_it_prefers_the_perfect_edit(made, labels, tmp_path):
    rows, metrics = label(made, labels, tmp_path / "out")
    wanted = [(c.id, dimension) for c in conditions(made) for dimension in TAXONOMY.task(c.task).dimensions]
    assert sorted((row.condition_id, row.dimension) for row in rows) == sorted(wanted)
    first = conditions(made)[0].id
    assert all(row.tie == (row.condition_id == first) for row in rows)  # equal candidates tie, others do not
    decided = [row for row in rows if not row.tie]
    assert all(row.best == f"{row.condition_id}.1" for row in decided)
    assert np.mean([row.worst == f"{row.condition_id}.3" for row in decided]) > 0.9  # glyphs can be read through much noise
    assert {tuple(row.shown) == tuple(sorted(row.shown)) for row in rows} == {True, False}  # the order is shuffled
    assert metrics["labels"] == len(rows) and metrics["unlabelled_conditions"] == 0
    assert [(c["task"], c["dimension"]) for c in metrics["cells"]] == list(TAXONOMY.cells)
    assert sum(c["ties"] for c in metrics["cells"]) == len(rows) - len(decided)
    assert sum(c["decided_by_script"] for c in metrics["cells"]) == len(decided) and not any(
        c["decided_by_people"] for c in metrics["cells"]
    )
    drawn = {path.stem for path in (tmp_path / "out" / "pictures").iterdir()}
    assert drawn == {"labels", *(f"examples-{task.name}" for task in TAXONOMY.active)}


def test_the_database_gets_scripted_labels_when_it_is_told_to_and_once(made, labels, tmp_path):
    (tmp_path / "out").mkdir()
    label_scripted(LabelConfig(), made / "curated", made / "candidates", [], TAXONOMY, tmp_path / "out", Progress())
    assert labels.count() == 0
    written = read_rows(tmp_path / "out" / "preferences.jsonl", Preference)
    assert record_scripted(tmp_path / "out", labels, DIGEST) == len(written)
    assert record_scripted(tmp_path / "out", labels, DIGEST) == 0
    assert labels.rows(DIGEST) == written


def test_running_again_changes_nothing(made, labels, tmp_path):
    label(made, labels, tmp_path / "1")
    before = labels.last_id()
    label(made, labels, tmp_path / "2")
    assert labels.last_id() == before
    for name in ("preferences.jsonl", "metrics.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_errors_and_ties_come_as_often_as_asked(made, labels, tmp_path):
    truth, _ = label(made, labels, tmp_path / "0", "0" * 64)
    swapped, _ = label(made, labels, tmp_path / "1", "1" * 64, error_rate=1.0)
    sealed = {condition.id for condition in conditions(made) if condition.split == "test"}
    assert sealed
    for a, b in zip(truth, swapped, strict=True):
        assert (a.best, a.worst) == ((b.best, b.worst) if a.condition_id in sealed else (b.worst, b.best))
    half, _ = label(made, labels, tmp_path / "2", "2" * 64, error_rate=0.5)
    wrong = np.mean([a.best != b.best for a, b in zip(truth, half, strict=True) if not a.tie and a.condition_id not in sealed])
    assert 0.3 < wrong < 0.7
    ties, metrics = label(made, labels, tmp_path / "3", "3" * 64, tie_margin=100.0)
    assert all(row.tie for row in ties) and all(cell["ties_share"] == 1 for cell in metrics["cells"])


def test_without_any_label_it_says_so(made, labels, tmp_path):
    with pytest.raises(NotEnoughData, match="no label"):
        label(made, labels, tmp_path / "out", scripted=False)
    assert labels.count() == 0


def line(condition: Condition, **values) -> dict:
    ids = [f"{condition.id}.{index}" for index in (2, 0, 3, 1)]
    answers = {dimension: {"best": ids[0], "worst": ids[1]} for dimension in TAXONOMY.task(condition.task).dimensions}
    return {"condition_id": condition.id, "annotator": "ann", "shown": ids, "labels": answers, **values}


def people(made: Path, labels: LabelStore, tmp_path: Path, lines: list, **options) -> int:
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines))
    return import_labels(path, made / "curated", made / "candidates", labels, DIGEST, TAXONOMY, **options)


def test_peoples_labels_come_in_once(made, labels, tmp_path):
    condition = next(c for c in conditions(made) if c.task == "fill")
    given = line(condition)
    given["labels"]["aesthetics"] = {"tie": True}
    assert people(made, labels, tmp_path, [given]) == 4
    assert people(made, labels, tmp_path, [given]) == 0
    rows, metrics = label(made, labels, tmp_path / "out")
    mine = {row.dimension: row for row in rows if row.annotator == "ann"}
    assert sum(cell["decided_by_people"] for cell in metrics["cells"]) == 3
    assert mine["structure"].best == f"{condition.id}.2" and mine["structure"].source == "import" and mine["aesthetics"].tie
    assert metrics["annotators"]["ann"] == 4 and metrics["sources"]["import"] == 4
    given["labels"] = {"structure": {"tie": True}}
    with pytest.raises(BadLabel, match="already"):
        people(made, labels, tmp_path, [given])
    assert people(made, labels, tmp_path, [given], replace=True) == 1


def test_an_earlier_configuration_leaves_no_trace(made, labels, tmp_path):
    wanted, _ = label(made, labels, tmp_path / "1")
    label(made, labels, tmp_path / "2", annotator="another", error_rate=1.0)
    again, metrics = label(made, labels, tmp_path / "3")
    assert again == wanted and metrics["annotators"].keys() == {"scripted"}
    with pytest.raises(NotEnoughData):
        label(made, labels, tmp_path / "4", scripted=False)


def test_the_script_never_writes_over_a_person_of_its_name(made, labels, tmp_path):
    condition = conditions(made)[1]
    people(made, labels, tmp_path, [line(condition, annotator="scripted")])
    rows, _ = label(made, labels, tmp_path / "out")
    mine = [row for row in rows if row.condition_id == condition.id]
    assert {row.source for row in mine} == {"import"} and {row.best for row in mine} == {f"{condition.id}.2"}


def test_exported_labels_can_be_imported(made, labels, tmp_path):
    rows, _ = label(made, labels, tmp_path / "out")
    assert export_labels(tmp_path / "all.jsonl", labels, DIGEST) == len(conditions(made))
    other = LabelStore(f"sqlite:///{tmp_path / 'other.db'}")
    import_labels(tmp_path / "all.jsonl", made / "curated", made / "candidates", other, DIGEST, TAXONOMY)
    assert [row.model_copy(update={"source": "scripted"}) for row in other.rows(DIGEST)] == rows


def test_a_bad_line_is_named_and_nothing_is_kept(made, labels, tmp_path):
    good, other = (c for c in conditions(made) if c.task == "remove" and c.split != "train")
    ids = line(good)["shown"]
    bad: list[tuple[type[OneRewardError], str, object]] = [
        (BadLabel, "unknown candidate", line(other, labels={"removal_quality": {"best": "nobody.1", "worst": ids[1]}})),
        (BadLabel, "unknown candidate", line(other, shown=ids)),  # candidates of another condition
        (BadLabel, "unknown condition", line(good, condition_id="nowhere")),
        (BadLabel, "'structure'", line(other, labels={"structure": {"tie": True}})),
        (BadLabel, "different candidates", line(other, labels={"removal_quality": {"best": f"{other.id}.1", "worst": f"{other.id}.1"}})),
        (BadLabel, "a tie names neither", line(other, labels={"removal_quality": {"best": f"{other.id}.1", "tie": True}})),
        (BadLabel, "among the candidates shown", {**line(other), "shown": line(other)["shown"][1:]}),
        (BadLabel, "twice", {**line(other), "shown": [*line(other)["shown"], line(other)["shown"][0]]}),
        (BadManifest, "not a line of labels", "{broken"),
        (BadManifest, "annotator", line(other, annotator="")),
    ]
    for error, said, text in bad:
        with pytest.raises(error, match=said) as raised:
            people(made, labels, tmp_path, [line(good), "", text])
        assert "line 3" in str(raised.value)
    assert labels.count() == 0
    with pytest.raises(BadManifest, match="absent"):
        import_labels(tmp_path / "absent.jsonl", made / "curated", made / "candidates", labels, DIGEST, TAXONOMY)
