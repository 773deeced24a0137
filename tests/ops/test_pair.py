"""Winner and loser out of best and worst."""

from pathlib import Path

import pytest

from infra.progress import Progress
from models.errors import BadLabel, NotEnoughData
from models.records import Candidate, Condition, Pair, Preference, read_rows, write_rows
from models.taxonomy import Taxonomy
from ops.pair import PairConfig, make_pairs

SPLIT = {"c0": "train", "c1": "train", "c2": "validation", "c3": "test"}


def vote(
    condition: str, best: int | None, worst: int | None, annotator: str = "a", dimension: str = "structure", shown: str = "0123"
) -> Preference:
    names = [None if index is None else f"{condition}.{index}" for index in (best, worst)]
    order = [f"{condition}.{index}" for index in shown]
    return Preference(
        condition_id=condition,
        dimension=dimension,
        annotator=annotator,
        source="import",
        shown=order,
        best=names[0],
        worst=names[1],
        tie=best is None,
    )


def pair(tmp_path: Path, votes: list[Preference], **values) -> tuple[list[Pair], dict]:
    rows = [Condition(id=c, source_id=c, task="fill", prompt=f"thing {c}", split=split, kind="user") for c, split in SPLIT.items()]
    drawn = {"seed": 0, "steps": 4, "negative_prompt": "", "true_cfg": 1.0, "guidance_scale": 1.0, "strength": 1.0, "scheduler": "e"}
    answers = [Candidate(id=f"{c}.{i}", condition_id=c, index=i, model_digest="0", **drawn) for c in SPLIT for i in range(4)]
    write_rows(tmp_path / "conditions.jsonl", rows)
    write_rows(tmp_path / "candidates.jsonl", answers)
    write_rows(tmp_path / "preferences.jsonl", votes)
    out = tmp_path / "out"
    out.mkdir()
    metrics = make_pairs(PairConfig(**values), tmp_path, tmp_path, tmp_path, out, Progress(), Taxonomy.load())
    assert (out / "pictures" / "pairs.png").stat().st_size < 200_000
    return read_rows(out / "pairs.jsonl", Pair), metrics


def cell(metrics: dict, dimension: str) -> dict:
    return next(c for c in metrics["cells"] if (c["task"], c["dimension"]) == ("fill", dimension))


def test_a_pair_per_answer_in_its_conditions_split(tmp_path):
    votes = [
        vote("c0", 1, 2),
        vote("c1", 0, 3, shown="3210"),
        vote("c2", 1, 0),
        vote("c3", 2, 0),
        vote("c3", None, None, dimension="aesthetics"),
    ]
    pairs, metrics = pair(tmp_path, votes)
    assert [(p.split, p.winner, p.loser, p.prompt) for p in pairs] == [
        ("train", "c0.1", "c0.2", "thing c0"),
        ("train", "c1.0", "c1.3", "thing c1"),
        ("validation", "c2.1", "c2.0", "thing c2"),
        ("test", "c3.2", "c3.0", "thing c3"),
    ]
    found = cell(metrics, "structure")
    assert (found["n_train"], found["n_validation"], found["n_test"], found["dropped_share"]) == (2, 1, 1, 0)
    assert found["first_wins_share"] == 0.25  # only c0's best was shown before its worst
    empty = cell(metrics, "aesthetics")
    assert (empty["ties"], empty["dropped_share"], empty["first_wins_share"]) == (1, 1.0, None)
    assert [(c["task"], c["dimension"]) for c in metrics["cells"]] == list(Taxonomy.load().cells)
    assert cell(metrics, "consistency")["dropped_share"] is None  # nobody was asked


def test_annotators_agree_add_and_contradict(tmp_path):
    votes = [vote("c0", 1, 2, "a"), vote("c0", 1, 2, "b"), vote("c1", 1, 2, "a"), vote("c1", 2, 1, "b"), vote("c1", 0, 3, "c")]
    pairs, metrics = pair(tmp_path, votes)
    assert [(p.winner, p.loser) for p in pairs] == [("c0.1", "c0.2"), ("c0.1", "c0.2"), ("c1.0", "c1.3")]
    assert metrics["contradictions"] == 2 and cell(metrics, "structure")["dropped_share"] == pytest.approx(0.4)


def test_contradictions_may_be_kept(tmp_path):
    pairs, metrics = pair(tmp_path, [vote("c1", 1, 2, "a"), vote("c1", 2, 1, "b")], drop_contradictions=False)
    assert len(pairs) == 2 and metrics["contradictions"] == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (vote("c9", 0, 1), "c9"),
        (vote("c0", 0, 1, shown="0145"), "c0.4"),
        (vote("c0", 0, 1, dimension="removal_quality"), "removal_quality"),
    ],
)
def test_labels_of_another_version_are_refused(tmp_path, wrong, said):
    with pytest.raises(BadLabel, match=said):
        pair(tmp_path, [wrong])
    assert not list((tmp_path / "out").iterdir())


def test_ties_alone_make_no_pairs(tmp_path):
    with pytest.raises(NotEnoughData):
        pair(tmp_path, [vote("c0", None, None)])
