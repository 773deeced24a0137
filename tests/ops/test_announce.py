"""What deployments see of production: the pointer file and the signed web request, with a receiver that answers, fails or is gone."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra.stores.dvc import DvcStore
from ops import announce as module
from ops.announce import HEADER, SECRET_VARIABLE, announce
from ops.audit import append, entry_digest, verify_chain
from tests.ops.test_audit import BY, home, opened, template

__all__ = ["home", "template"]  # fixtures
SECRET = "planted-webhook-secret"


class Receiver(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.taken: list[tuple[Message, bytes]] = []
        self.fails = 0  # how many requests are answered with an error first

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=in-the-query"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.headers, body))
        self.server.fails -= 1
        self.send_response(503 if self.server.fails >= 0 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def production(home: Path) -> tuple[Path, DvcStore]:
    store, keys = opened(home)
    append(store, keys, store.versions("release")[1].ref, "production", **BY)
    return home, store


def told(home: Path, url: str | None) -> list[str]:
    warnings: list[str] = []
    store, keys = opened(home)
    announce(store, keys, home, webhook=url, warn=warnings.append)
    verify_chain("release", store.moves("release"), keys)
    return warnings


def test_the_pointer_and_a_signed_request_say_what_production_is(production: tuple[Path, DvcStore], receiver: Receiver) -> None:
    home, store = production
    receiver.fails = 1
    assert told(home, receiver.url) == []
    pointer, move = json.loads((home / "production.json").read_text()), store.moves("release")[-1]
    assert (pointer["digest"], pointer["version"], pointer["counter"], pointer["entry"]) == (move.digest, 2, 1, entry_digest(move))
    assert pointer["name"] == "release" and pointer["when"] == move.when and move.digest in pointer["uri"]
    assert len(receiver.taken) == 2  # the first was answered with an error
    headers, body = receiver.taken[-1]
    assert json.loads(body) == pointer
    assert headers[HEADER] == "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    assert SECRET not in "".join(path.read_text(errors="ignore") for path in home.rglob("*") if path.is_file())


def test_a_dead_receiver_is_one_warning_and_a_note(
    production: tuple[Path, DvcStore], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, store = production
    receiver.fails = 99
    (warning,) = told(home, receiver.url)
    assert "it answered 503, 3 times" in warning and "in-the-query" not in warning
    note = store.moves("release")[-1]
    assert note.stage == "undelivered" and "503" in note.reason and "in-the-query" not in note.reason
    receiver.fails = 0
    (warning,) = told(home, "http://127.0.0.1:1/nobody")
    assert "refused" in warning.lower()
    monkeypatch.delenv(SECRET_VARIABLE)
    (warning,) = told(home, receiver.url)
    assert f"{SECRET_VARIABLE} is not set" in warning and len(receiver.taken) == 3
    assert json.loads((home / "production.json").read_text())["version"] == 2
    production_ = store.stage("release", "production")
    assert production_ is not None and production_ == store.versions("release")[1].ref
