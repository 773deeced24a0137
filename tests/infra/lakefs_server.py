"""A stand-in for a lakeFS server: the paths, status codes and checks of its REST API that the store meets, in memory, on loopback.

    with LakeFS() as server:                            # server.environment: what a user would export
        server.fail("POST", "/tags", 409, times=1)      # or "cut", "cut body", or seconds to wait

Requests and answers are made with the strict models of lakefs-sdk, so that neither side can invent a field. It keeps branches with
uncommitted objects, commits with parents, three-way merges, immutable tags, protected branches, presigned and multipart upload, and
the metadata a pre-merge action demands (the `args` of its hook; the Lua around them does not run here).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import lakefs_sdk as api
from pydantic.v1 import ValidationError

from tests.infra.lakefs_routes import ROUTES, plain
from tests.infra.lakefs_state import Branch, Refused, Repository

KEY_ID, SECRET = "AKIAPLANTED", "planted-secret-key-of-the-test"


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    how: int | float | str
    times: int


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LakeFS:
    """The server. `presign` and `multipart`: what its object store offers; `page`: the most a listing returns at once."""

    def __init__(self, *, presign: bool = False, multipart: bool = False, page: int = 1000):
        self.presign, self.multipart, self.page = presign, multipart, page
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.signatures: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.reason = "made to fail"  # what a failure by `fail` says
        self.lock = threading.RLock()
        self.http = Http(("127.0.0.1", 0), type("Handler", (Handler,), {"lakefs": self}))

    def __enter__(self) -> LakeFS:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {"LAKEFS_ENDPOINT": self.endpoint, "LAKEFS_ACCESS_KEY_ID": KEY_ID, "LAKEFS_SECRET_ACCESS_KEY": SECRET}

    def fail(self, method: str, path: str, how: int | float | str, times: int = 1) -> None:
        """Let the next `times` requests whose path matches fail: an int is a status, a float seconds to wait, "cut" or "cut body"."""
        self.faults.append(Fault(method, re.compile(path), how, times))

    def count(self, method: str, path: str) -> int:
        """How many such requests came."""
        return sum(1 for verb, where in self.requests if verb == method and re.search(path, where))

    def fault(self, method: str, path: str) -> int | float | str | None:
        with self.lock:
            self.requests.append((method, path))
            for each in self.faults:
                if each.method == method and each.path.search(path) and each.times:
                    each.times -= 1
                    return each.how
        return None

    # What the routes share

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refused(404, f"repository {name} not found")
        return self.repositories[name]

    def add_repository(self, name: str, namespace: str = "", protected: bool = False) -> Repository:
        repo = self.repositories[name] = Repository(name, namespace or f"mem://{name}", int(time.time()))
        repo.branches["main"] = Branch(repo.add((), {}, "Repository created", None, repo.created).id)
        repo.protected = {"main"} if protected else set()
        return repo

    def store(self, data: bytes, address: str | None = None) -> str:
        address = address or f"mem://{secrets.token_hex(16)}"
        self.blobs[address] = data
        return address

    def stage(self, branch: Branch, path: str, address: str, checksum: str, metadata: dict[str, str] | None) -> api.ObjectStats:
        stats = api.ObjectStats(
            path=path,
            path_type="object",
            physical_address=address,
            checksum=checksum,
            size_bytes=len(self.blobs[address]),
            mtime=int(time.time()),
            metadata=metadata or {},
        )
        branch.staged[path] = stats
        return stats

    def sign(self, address: str) -> str:
        signature = secrets.token_hex(16)
        self.signatures.add(signature)
        return f"{self.endpoint}/_storage/{address.removeprefix('mem://')}?signature={signature}"


class Handler(BaseHTTPRequestHandler):
    """One connection; the routes are in tests/infra/lakefs_routes.py."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece: in two, the second waits for the first one's acknowledgement
    disable_nagle_algorithm = True
    lakefs: LakeFS

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        server = self.lakefs
        how = server.fault(self.command, unquote(url.path))
        if how == "cut":
            return self._cut()
        if isinstance(how, float):
            time.sleep(how)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the client is gone
            return self._cut()
        self.torn = how == "cut body"
        try:
            if isinstance(how, int):
                raise Refused(how, server.reason)
            if url.path.startswith("/_storage/"):
                return self._storage(url.path.removeprefix("/_storage/"))
            token = base64.b64encode(f"{KEY_ID}:{SECRET}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {token}":
                raise Refused(401, "error authenticating request")
            with server.lock:
                self._route(url.path)
        except ValidationError as error:
            self.answer(400, api.Error(message=str(error)))
        except Refused as refused:
            self.answer(refused.status, api.Error(message=refused.message))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    def log_message(self, *_: object) -> None:
        pass

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _route(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return function(self, self.lakefs, **{key: unquote(value) for key, value in match.groupdict().items()})
        raise Refused(404 if self.command == "GET" else 405, f"{self.command} {path} is not there")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def parsed(self, model: Any) -> Any:
        return model.parse_obj(self.json())

    def answer(self, status: int, model: Any = None, headers: dict[str, str] | None = None) -> None:
        data = model if isinstance(model, bytes) else b"" if model is None else json.dumps(plain(model)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(model, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.torn:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._cut()
        if self.command != "HEAD":
            self.wfile.write(data)

    def pages(self, items: dict[str, Any], model: Any) -> None:
        """A page of `items` by key, as every listing of lakeFS is paged."""
        prefix, after = self.query.get("prefix", ""), self.query.get("after", "")
        keys = sorted(key for key in items if key.startswith(prefix) and key > after)
        amount = min(int(self.query.get("amount", 100)), self.lakefs.page)
        shown = keys[:amount]
        more = len(keys) > amount
        pagination = api.Pagination(has_more=more, next_offset=shown[-1] if more else "", results=len(shown), max_per_page=1000)
        self.answer(200, model(pagination=pagination, results=[items[key] for key in shown]))

    def send(self, data: bytes) -> None:
        """Bytes, or the range of them that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, data)
        start, end = int(asked[1]), int(asked[2] or len(data) - 1)
        if start >= len(data):
            raise Refused(416, "Requested Range Not Satisfiable")
        self.answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _storage(self, address: str) -> None:
        """The object store behind lakeFS: presigned addresses only, and no second kind of authentication beside them."""
        if "Authorization" in self.headers or self.query.get("signature") not in self.lakefs.signatures:
            raise Refused(403, "signature does not match")
        if self.command == "GET" and f"mem://{address}" not in self.lakefs.blobs:
            raise Refused(404, "no such key")
        if self.command == "GET":
            return self.send(self.lakefs.blobs[f"mem://{address}"])
        if "Content-Length" not in self.headers:
            raise Refused(411, "length required")
        upload, _, part = address.partition("/")
        if part:
            self.lakefs.uploads[upload][1][int(part)] = self.body
        else:
            self.lakefs.store(self.body, f"mem://{address}")
        self.torn = False
        self.answer(200, None, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
