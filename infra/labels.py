"""The label database: who judged which candidates, what they saw, and what they chose.

    labels = LabelStore("sqlite:///labels.db")        # or postgresql+psycopg2://user:password@host/labels
    labels.add(preferences, candidates_digest)         # all or nothing
    labels.rows(candidates_digest)

A label belongs to the digest of the candidates artifact it was given for, so labels of an older version never leak into a
newer one. One annotator has one label per condition and dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from models.errors import BadLabel, ConfigError, DiskFull, ServerUnreachable, StoreError
from models.records import Preference

WAIT_S = 30  # ours: how long a writer waits for another one


class _Base(DeclarativeBase):
    pass


class _Label(_Base):
    __tablename__ = "preferences"
    __table_args__ = (sa.UniqueConstraint("candidates", "condition_id", "dimension", "annotator"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True)  # never used twice: the retraining sensor's cursor
    candidates: Mapped[str] = mapped_column(sa.String(64), index=True)
    condition_id: Mapped[str]
    dimension: Mapped[str]
    annotator: Mapped[str]
    source: Mapped[str]
    shown: Mapped[list[str]] = mapped_column(sa.JSON)
    best: Mapped[str | None]
    worst: Mapped[str | None]
    tie: Mapped[bool]

    def row(self) -> Preference:
        return Preference.model_validate({name: getattr(self, name) for name in Preference.model_fields})


class LabelStore:
    """Labels in any database SQLAlchemy reaches; SQLite unless told otherwise.

    Raises ServerUnreachable where the server does not answer or the file cannot be opened, ConfigError for a URL of no database.
    """

    def __init__(self, url: str):
        try:
            self._engine = sa.create_engine(url)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError) as error:
            raise ConfigError(
                "The label database's URL is not one.", "Write it like sqlite:///labels.db or postgresql+psycopg2://host/name."
            ) from error
        except ImportError as error:
            raise ServerUnreachable(
                f"The label database's driver {error.name} is not installed.", "Install the extra `postgres`."
            ) from error
        self._shown_url = self._engine.url.render_as_string(hide_password=True)
        if self._engine.dialect.name == "sqlite":
            _prepare_sqlite(self._engine)
        with self._session() as session:
            _Base.metadata.create_all(session.connection())

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, undone by any exception in it."""
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except sa.exc.DatabaseError as error:
            if "disk is full" in str(error.orig):
                raise DiskFull(f"No space left for the label database {self._shown_url}.", "Free some space and run again.") from error
            if isinstance(error, sa.exc.IntegrityError):
                raise StoreError("Another process added the same labels at the same moment.", "Run again.") from error
            raise ServerUnreachable(
                f"The label database {self._shown_url} cannot be used: {error.orig}.",
                "Start the server, or correct the path or its permissions.",
            ) from error

    def add(self, rows: Iterable[Preference], candidates_digest: str, *, replace: bool = False) -> int:
        """Add labels, all or none, and return how many are new or changed. A label already there is left alone.

        Raises BadLabel when two rows, or a row and the database, give one annotator two answers to one question; `replace`
        lets the new answer stand instead of the database's, but a script's never instead of a person's.
        """
        wanted: dict[tuple[str, str, str], Preference] = {}
        for row in rows:
            if wanted.setdefault(_key(row), row) != row:
                raise BadLabel(
                    f"{row.annotator} labels {row.condition_id} on {row.dimension} twice, and differently.", "Keep one of the two."
                )
        with self._session() as session:
            there = {_key(label.row()): label for label in session.scalars(sa.select(_Label).where(_Label.candidates == candidates_digest))}
            fresh = []
            for key, row in wanted.items():
                old = there.get(key)
                if old is not None and (old.row() == row or (replace and (old.source, row.source) == ("import", "scripted"))):
                    continue
                if old is not None and not replace:
                    raise BadLabel(
                        f"{row.annotator} has already labelled {row.condition_id} on {row.dimension} differently.",
                        "Import with `replace` to correct it.",
                    )
                if old is not None:
                    session.delete(old)
                fresh.append(_Label(candidates=candidates_digest, **row.model_dump()))
            session.flush()  # the old answers go before the new ones come: they share a unique key
            session.add_all(fresh)
        return len(fresh)

    def rows(self, candidates_digest: str) -> list[Preference]:
        """Every label given for these candidates, ordered by condition, dimension and annotator."""
        order = (_Label.condition_id, _Label.dimension, _Label.annotator)
        with self._session() as session:
            return [
                label.row() for label in session.scalars(sa.select(_Label).where(_Label.candidates == candidates_digest).order_by(*order))
            ]

    def count(self, since_id: int = 0, *, sources: Sequence[str] = ()) -> int:
        """How many labels have an id above `since_id`; of the given sources only, where some are named."""
        with self._session() as session:
            return session.scalar(_of(sa.select(sa.func.count(_Label.id)), sources).where(_Label.id > since_id)) or 0

    def last_id(self, *, sources: Sequence[str] = ()) -> int:
        """The newest label's id, 0 without any. A corrected label gets a new id."""
        with self._session() as session:
            return session.scalar(_of(sa.select(sa.func.max(_Label.id)), sources)) or 0

    def close(self) -> None:
        self._engine.dispose()


def _key(row: Preference) -> tuple[str, str, str]:
    return row.condition_id, row.dimension, row.annotator


def _of(query: sa.Select[Any], sources: Sequence[str]) -> sa.Select[Any]:
    return query.where(_Label.source.in_(sources)) if sources else query


def _prepare_sqlite(engine: sa.Engine) -> None:
    """Transactions take the write lock at once, and wait for it: no deadlock, no lost update.

    A new file keeps SQLite's own journal, an older one its WAL: to change to WAL needs the file alone and does not wait, so that of
    several who open a new one at once some would fail.
    """
    if engine.url.database and engine.url.database != ":memory:":
        try:
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerUnreachable(
                f"The folder of {engine.url.database} cannot be made.", "Correct the path or its permissions."
            ) from error

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the begin below is ours, not the driver's
        connection.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
