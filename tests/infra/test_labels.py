"""The label database: all or nothing, no label twice, clear errors."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from infra.labels import LabelStore
from models.errors import BadLabel, ConfigError, DiskFull, ServerUnreachable
from models.records import Preference

DIGEST = "a" * 64


def label(condition: str = "c1", annotator: str = "ann", best: int = 0, worst: int = 3, source: str = "import") -> Preference:
    shown = [f"{condition}.{index}" for index in (2, 0, 3, 1)]
    answer = {"best": f"{condition}.{best}", "worst": f"{condition}.{worst}"}
    return Preference(condition_id=condition, dimension="structure", annotator=annotator, source=source, shown=shown, **answer)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'deeper' / 'labels.db'}"


def test_what_goes_in_comes_out(url):
    tie = Preference(
        condition_id="c0", dimension="structure", annotator="ann", source="import", shown=["c0.0"], best=None, worst=None, tie=True
    )
    assert LabelStore(url).add([label(), tie], DIGEST) == 2
    store = LabelStore(url)  # another process would open it anew
    assert store.rows(DIGEST) == [tie, label()] and store.rows("b" * 64) == []


def test_adding_again_changes_nothing(url):
    store = LabelStore(url)
    store.add([label()], DIGEST)
    before = store.last_id()
    assert store.add([label(), label()], DIGEST) == 0
    assert store.last_id() == before and store.count() == 1
    assert store.add([label()], "b" * 64) == 1  # other candidates, another label


def test_another_answer_is_refused_unless_it_replaces(url):
    store = LabelStore(url)
    store.add([label()], DIGEST)
    with pytest.raises(BadLabel, match="ann has already labelled c1 on structure"):
        store.add([label("c2"), label(best=1)], DIGEST)
    assert store.rows(DIGEST) == [label()]  # c2 did not slip in
    with pytest.raises(BadLabel, match="twice"):
        store.add([label("c3"), label("c3", best=1)], DIGEST)
    before = store.last_id()
    assert store.add([label(best=1)], DIGEST, replace=True) == 1
    assert store.rows(DIGEST) == [label(best=1)] and store.count(before) == 1


def test_a_script_never_replaces_a_persons_answer(url):
    store = LabelStore(url)
    store.add([label()], DIGEST)
    assert store.add([label(best=1, source="scripted"), label("c2", source="scripted")], DIGEST, replace=True) == 1
    assert store.rows(DIGEST) == [label(), label("c2", source="scripted")]
    assert store.add([label("c2", best=1)], DIGEST, replace=True) == 1  # a person corrects the script


def test_the_sensor_counts_what_is_new(url):
    store = LabelStore(url)
    assert store.last_id() == 0
    store.add([label(f"c{index}") for index in range(3)], DIGEST)
    cursor = store.last_id()
    store.add([label(f"c{index}", "machine", source="scripted") for index in range(5)], DIGEST)
    assert store.count() == 8 and store.count(cursor) == 5
    assert store.count(cursor, sources=["import"]) == 0 and store.last_id(sources=["import"]) == cursor


def test_an_interrupted_addition_leaves_nothing(url):
    store = LabelStore(url)

    def rows():
        yield label()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(rows(), DIGEST)
    assert store.count() == 0


@pytest.mark.parametrize("journal", ["delete", "wal"])  # wal: as earlier versions left it
def test_many_writers_lose_nothing(url, journal):
    LabelStore(url).close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    failures = []

    def write(name: str) -> None:
        try:
            store = LabelStore(url)
            for index in range(10):
                store.add([label(f"c{index}", name), label(f"c{index}", "everyone")], DIGEST)
            store.close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"ann-{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and LabelStore(url).count() == 50


def test_a_new_database_opened_by_many_at_once_is_opened_by_all(url):
    with ThreadPoolExecutor(4) as pool:
        for index in range(30):  # a race: where opening sets WAL, it fails in a few rounds of thirty
            opened = [pool.submit(LabelStore, f"{url}-{index}") for _ in range(4)]
            for store in opened:
                store.result().close()


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sqlite:////proc/no/labels.db", ServerUnreachable),
        ("postgresql+psycopg2://me:secret@127.0.0.1:1/labels", ServerUnreachable),
        ("nothing", ConfigError),
    ],
)
def test_a_database_that_is_not_there(url, error):
    with pytest.raises(error) as raised:
        LabelStore(url)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "labels.db").write_text("hello" * 1000)
    with pytest.raises(ServerUnreachable, match="not a database"):
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")


def test_a_full_disk_is_named_and_undone(url):
    store = LabelStore(url)
    store.add([label()], DIGEST)

    @sa.event.listens_for(store._engine, "begin")
    def _cap(connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(DiskFull):
        store.add([label(f"c{index:04d}", "x" * 200) for index in range(500)], DIGEST)
    assert LabelStore(url).rows(DIGEST) == [label()]


def test_it_is_a_plain_sqlite_file(url):
    LabelStore(url).add([label()], DIGEST)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        assert connection.execute("SELECT annotator, best FROM preferences").fetchall() == [("ann", "c1.0")]
