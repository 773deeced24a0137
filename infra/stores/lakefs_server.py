"""One lakeFS repository over HTTP: the few calls the store needs, with retries, time limits and this project's errors.

    server = open_server("onereward")          # LAKEFS_ENDPOINT, LAKEFS_ACCESS_KEY_ID, LAKEFS_SECRET_ACCESS_KEY
    server.upload("run-1", "artifacts/onnx/a", Path("a"), sha256)

Calls go through the API classes that lakeFS generates from its OpenAPI document (`lakefs-sdk`, configured by `lakefs`); bytes are
streamed beside them, because those classes hold a whole object in memory. Every request may be sent twice: what it makes is named by
content or created only if absent, so a repeated one changes nothing. Credentials come from the environment and are sent to
the endpoint alone: never to an object store, and into no message.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from infra.disk import no_space
from infra.stores.lakefs_access import ENDPOINT, KEY_ID, SECRET, Access, Connection, connect
from models.errors import ConfigError, DiskFull, OneRewardError, ServerUnreachable, StoreError

CLIENT = "LAKEFS_CLIENT"  # `lakefs-client` chooses the deprecated package (infra/stores/lakefs_client.py)
NAMESPACE = "LAKEFS_STORAGE_NAMESPACE"  # where a new repository's objects go, e.g. s3://bucket/onereward
MAIN = "main"
REPOSITORY = re.compile(r"[a-z0-9][a-z0-9-]{2,62}")  # what lakeFS allows
TIMEOUT = urllib3.Timeout(connect=10, read=120)  # seconds, ours: a merge of many objects takes some tens of seconds
RETRIES = 6  # ours: with the pauses below, a server may be away for half a minute
BACKOFF_S = 0.5  # ours: doubled at each retry
BUSY = (429, 500, 502, 503, 504)
PART_BYTES = 16 * 2**20  # ours: object stores want parts of at least 5 MiB and at most 10,000 of them; one is held in memory
PAGE = 1000  # the most lakeFS returns at once
AUTH = ["basic_auth"]
SHOWN = 300  # characters of a server's reason, ours


class Missing(StoreError):
    """The server has no such repository, branch, tag, commit or object (404)."""


class Taken(StoreError):
    """The name exists already, or another writer was quicker (409)."""


def open_server(repository: str, **limits: Any) -> Server:
    """The repository on the server the environment names. Raises ConfigError; nothing is sent yet.

    limits: other retries and time limits than `Server` has.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r} cannot name a lakeFS repository.", "Use 3 to 63 of a-z, 0-9 and -, beginning with no -.")
    if os.environ.get(CLIENT) == "lakefs-client":
        from infra.stores.lakefs_client import connect as chosen
    else:
        chosen = connect
    return Server(repository, Access.from_env(), chosen, **limits)


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it."""

    size: int
    sha256: str  # as its writer told; empty when another tool wrote it
    uploaded: int  # seconds since 1970, by the server's clock

    @property
    def content(self) -> tuple[str, int]:
        return self.sha256, self.size


class Server:
    """One repository. Safe to use from several threads."""

    def __init__(
        self,
        repository: str,
        access: Access,
        connect: Callable[[Access, urllib3.Retry], Connection] = connect,
        *,
        retries: int = RETRIES,
        backoff_s: float = BACKOFF_S,
        timeout: urllib3.Timeout = TIMEOUT,
        part_bytes: int = PART_BYTES,
    ):
        # It warns at every retry with the request's address, and that of a presigned one is a credential.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self.repository, self.endpoint = repository, access.endpoint
        self._secrets = (access.secret, access.key_id)
        self.retries, self.backoff_s, self.timeout, self.part_bytes = retries, backoff_s, timeout, part_bytes
        # None: also POST, see above. A redirect is followed by `_get`, which then leaves the credentials out.
        retry = urllib3.Retry(
            total=retries, redirect=0, backoff_factor=backoff_s, status_forcelist=BUSY, allowed_methods=None, raise_on_status=False
        )
        self._api, self._models, self._failure = connect(access, retry)
        self._http = self._api.objects_api.api_client
        self._bare = urllib3.PoolManager(
            retries=retry.new(redirect=None), timeout=timeout, maxsize=32
        )  # for presigned addresses: sends no credentials

    # The repository

    def user(self) -> str:
        """Who the credentials belong to."""
        return self._call("tell who you are", self._api.auth_api.get_current_user)["user"]["id"]

    def exists(self) -> bool:
        try:
            self._call("look the repository up", self._api.repositories_api.get_repository, self.repository)
        except Missing:
            return False
        return True

    def create(self) -> None:
        """Make the repository. Raises ConfigError when nothing says where its objects go."""
        namespace = self.namespace()
        body = self._models.RepositoryCreation(name=self.repository, storage_namespace=namespace, default_branch=MAIN)
        self._call(f"create the repository in {namespace}", self._api.repositories_api.create_repository, body)

    def namespace(self) -> str:
        """Where the objects of a new repository would go. Raises ConfigError when neither this machine nor the server says."""
        if os.environ.get(NAMESPACE):
            return os.environ[NAMESPACE]
        prefix = self._storage.get("default_namespace_prefix")
        if not prefix and self._storage["blockstore_type"] in ("local", "mem"):
            prefix = f"{self._storage['blockstore_type']}://"
        if not prefix:
            raise ConfigError(f"{NAMESPACE} is not set.", f"Say where objects of {self.repository} go, e.g. s3://bucket/onereward.")
        return f"{prefix}{'' if prefix.endswith('/') else '/'}{self.repository}"

    def protected(self) -> bool:
        """Whether `main` is protected from direct writes."""
        rules = self._call("read the branch protection", self._api.repositories_api.get_branch_protection_rules, self.repository)
        return any(rule["pattern"] == MAIN for rule in rules)

    def protect(self) -> None:
        rules = self._call("read the branch protection", self._api.repositories_api.get_branch_protection_rules, self.repository)
        patterns = {rule["pattern"] for rule in rules} | {MAIN}
        body = [self._models.BranchProtectionRule(pattern=pattern) for pattern in sorted(patterns)]
        self._call(f"protect {MAIN}", self._api.repositories_api.set_branch_protection_rules, self.repository, body)

    # Branches, commits and tags

    def branch(self, name: str) -> None:
        """Make a branch of `main`, unless it exists."""
        body = self._models.BranchCreation(name=name, source=MAIN)
        try:
            self._call(f"create the branch {name}", self._api.branches_api.create_branch, self.repository, body)
        except Taken:
            return

    def branches(self, prefix: str) -> list[str]:
        return [
            each["id"] for each in self._pages("list the branches", self._api.branches_api.list_branches, self.repository, prefix=prefix)
        ]

    def drop(self, branch: str) -> None:
        """Delete a branch, unless it is gone."""
        try:
            self._call(f"delete the branch {branch}", self._api.branches_api.delete_branch, self.repository, branch)
        except Missing:
            return

    def commit(self, branch: str, message: str, metadata: dict[str, str]) -> str:
        """Commit what was uploaded to a branch, also when that is nothing new: the commit's id."""
        body = self._models.CommitCreation(message=message, metadata=metadata, allow_empty=True)
        return self._call(f"commit to {branch}", self._api.commits_api.commit, self.repository, branch, body)["id"]

    def merge(self, source: str, branch: str, message: str, metadata: dict[str, str]) -> str:
        """Merge a reference into a branch, the source's objects winning: the merge commit's id. Raises StoreError when a hook refuses."""
        body = self._models.Merge(message=message, metadata=metadata, strategy="source-wins", allow_empty=True)
        doing = f"merge {source} into {branch}"
        return self._call(doing, self._api.refs_api.merge_into_branch, self.repository, source, branch, merge=body)["reference"]

    def tag(self, name: str, commit: str) -> None:
        """Make a tag. Raises Taken when it exists on another commit."""
        body = self._models.TagCreation(id=name, ref=commit)
        try:
            self._call(f"create the tag {name}", self._api.tags_api.create_tag, self.repository, body)
        except Taken:
            there = self._call(f"read the tag {name}", self._api.tags_api.get_tag, self.repository, name)
            if there["commit_id"] != commit:  # else it is ours, from a request whose answer was lost
                raise

    def tags(self, prefix: str = "") -> dict[str, str]:
        """Tag -> commit id, sorted by name."""
        found = self._pages("list the tags", self._api.tags_api.list_tags, self.repository, **({"prefix": prefix} if prefix else {}))
        return {tag["id"]: tag["commit_id"] for tag in found}

    def metadata(self, commit: str) -> dict[str, str]:
        """What a commit says about itself."""
        return self._call(f"read the commit {commit[:12]}", self._api.commits_api.get_commit, self.repository, commit).get("metadata") or {}

    # Objects

    def objects(self, ref: str, prefix: str) -> dict[str, Stored]:
        """The objects of a reference below a prefix, uncommitted ones of a branch included: path behind the prefix -> object."""
        found = self._pages(f"list {prefix}", self._api.objects_api.list_objects, self.repository, ref, prefix=prefix, user_metadata=True)
        return {
            each["path"].removeprefix(prefix): Stored(
                each.get("size_bytes") or 0, (each.get("metadata") or {}).get("sha256", ""), each["mtime"]
            )
            for each in found
        }

    def holds(self, ref: str, prefix: str) -> bool:
        """Whether a reference has any object below a prefix."""
        page = self._call(f"list {prefix}", self._api.objects_api.list_objects, self.repository, ref, prefix=prefix, amount=1)
        return bool(page["results"])

    def upload(self, branch: str, path: str, source: Path, sha256: str) -> None:
        """Stream a file to a branch: in parts or to a presigned address where the server offers that, else through the server."""
        with self._transfer(f"upload {path}"):
            if self._storage.get("pre_sign_multipart_upload") and source.stat().st_size > self.part_bytes:
                self._upload_parts(branch, path, source, sha256)
            elif self._storage["pre_sign_support"]:
                self._upload_presigned(branch, path, source, sha256)
            else:
                headers = {"Content-Type": "application/octet-stream", "x-lakefs-meta-sha256": sha256}
                headers["Content-Length"] = str(source.stat().st_size)
                with source.open("rb") as file:
                    self._bytes("POST", f"branches/{branch}/objects", path, headers=headers, body=file)

    def download(self, ref: str, path: str, target: Path) -> None:
        """Stream an object to a file, going on where a cut connection left it. Raises Missing for an object that is not there."""
        with self._transfer(f"download {path}"), target.open("wb") as file:
            for attempt in range(self.retries + 1):
                try:
                    self._fetch(ref, path, file)
                    return
                except urllib3.exceptions.HTTPError:
                    if attempt == self.retries:
                        raise
                    time.sleep(self.backoff_s * 2**attempt)

    def _fetch(self, ref: str, path: str, file: Any) -> None:
        headers = {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
        presign = {"presign": "true"} if self._storage["pre_sign_support"] else {}
        answer = self._bytes("GET", f"refs/{ref}/objects", path, headers=headers, preload_content=False, **presign)
        if location := answer.get_redirect_location():
            answer.release_conn()
            answer = self._checked(self._bare.request("GET", str(location), headers=headers, preload_content=False))
        if answer.status == 200:  # the whole object, whatever range was asked for
            file.seek(0)
            file.truncate()
        for chunk in answer.stream(2**20):
            file.write(chunk)
        answer.release_conn()

    def _upload_presigned(self, branch: str, path: str, source: Path, sha256: str) -> None:
        staging, size = self._api.staging_api, source.stat().st_size
        place = self._call(f"stage {path}", staging.get_physical_address, self.repository, branch, path, presign=True)
        with source.open("rb") as file:
            answer = self._put(place["presigned_url"], file, size)
        body = self._models.StagingMetadata(
            staging=self._models.StagingLocation(**place), checksum=answer, size_bytes=size, user_metadata={"sha256": sha256}
        )
        self._call(f"link {path}", staging.link_physical_address, self.repository, branch, path, body)

    def _upload_parts(self, branch: str, path: str, source: Path, sha256: str) -> None:
        api, place = self._api.experimental_api, (self.repository, branch)
        count = math.ceil(source.stat().st_size / self.part_bytes)
        upload = self._call(f"stage {path}", api.create_presign_multipart_upload, *place, path, parts=count)
        try:
            with source.open("rb") as file:
                tags = [self._put(url, part := file.read(self.part_bytes), len(part)) for url in upload["presigned_urls"]]
            body = self._models.CompletePresignMultipartUpload(
                physical_address=upload["physical_address"],
                parts=[self._models.UploadPart(part_number=n, etag=tag) for n, tag in enumerate(tags, 1)],
                user_metadata={"sha256": sha256},
            )
            given: dict[str, Any] = {"complete_presign_multipart_upload": body}
            self._call(f"complete {path}", api.complete_presign_multipart_upload, *place, upload["upload_id"], path, **given)
        except BaseException:
            address = self._models.AbortPresignMultipartUpload(physical_address=upload["physical_address"])
            given = {"abort_presign_multipart_upload": address}
            self._call(f"abort {path}", api.abort_presign_multipart_upload, *place, upload["upload_id"], path, **given)
            raise

    def _put(self, url: str, body: Any, size: int) -> str:
        """Send bytes to a presigned address: the object store's checksum of them."""
        answer = self._checked(self._bare.request("PUT", url, body=body, headers={"Content-Length": str(size)}))
        return answer.headers.get("ETag", "").strip('"')

    def _bytes(
        self, method: str, place: str, path: str, *, headers: dict[str, str], body: Any = None, preload_content: bool = True, **query: str
    ) -> Any:
        """A request for an object's bytes, which the generated classes would hold in memory."""
        url = f"{self._http.configuration.host}/repositories/{self.repository}/{place}?{urlencode({'path': path, **query})}"
        self._http.update_params_for_auth(headers := dict(headers), [], AUTH, place, method, None)
        pool = self._http.rest_client.pool_manager
        return self._checked(
            pool.request(method, url, headers=headers, body=body, preload_content=preload_content, timeout=self.timeout, redirect=False)
        )

    # Answers and errors

    @cached_property
    def _storage(self) -> dict[str, Any]:
        """What the server's object store can do."""
        return self._call("read its configuration", self._api.config_api.get_config)["storage_config"]

    def _pages(self, doing: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Iterator[dict[str, Any]]:
        more = True
        while more:
            page = self._call(doing, call, *arguments, amount=PAGE, **keywords)
            yield from page["results"]
            more, keywords["after"] = page["pagination"]["has_more"], page["pagination"]["next_offset"]

    def _call(self, doing: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """A call of the generated client, its answer as plain dicts and lists.

        Errors are raised without their cause, whose text may hold a presigned address or what a server says of the credentials.
        """
        try:
            answer = call(*arguments, _request_timeout=(self.timeout.connect_timeout, self.timeout.read_timeout), **keywords)
        except self._failure as error:
            status, body = getattr(error, "status", None), getattr(error, "body", None)
            raise self._error(doing, status, body, getattr(error, "reason", None) or type(error).__name__) from None
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(doing, error) from None
        except (TypeError, ValueError) as error:
            raise self._error(doing, None, None, f"its answer is not what its API allows ({type(error).__name__})") from error
        return [each.to_dict() for each in answer] if isinstance(answer, list) else getattr(answer, "to_dict", lambda: answer)()

    def _checked(self, answer: Any) -> Any:
        """The answer. Raises for a status that says no."""
        if answer.status >= 400:
            raise self._error("transfer an object", answer.status, answer.data, "")
        return answer

    @contextmanager
    def _transfer(self, doing: str) -> Iterator[None]:
        try:
            yield
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(doing, error) from None
        except OSError as error:
            if no_space(error):
                raise DiskFull(f"No space left to {doing}.", "Free some space and try again.") from error
            raise StoreError(f"This machine could not {doing}: {error}.", "See the cause above.") from error

    def _unreachable(self, doing: str, error: Exception) -> ServerUnreachable:
        reason = getattr(error, "reason", None) or error
        what = f"lakeFS at {self.endpoint} does not answer, to {doing} ({type(reason).__name__})."
        return ServerUnreachable(what, f"Start the server, wait for it, or correct {ENDPOINT[0]}; then do the same again.")

    def _error(self, doing: str, status: int | None, body: Any, otherwise: str) -> OneRewardError:
        said = _message(body) or otherwise
        for secret in self._secrets:
            said = said.replace(secret, "***")
        what = f"lakeFS at {self.endpoint} could not {doing}: {said or 'no reason given'} ({status})."
        if status == 401:
            return StoreError(what, f"Set {KEY_ID[0]} and {SECRET[0]} to a key pair that exists and has not expired.")
        if status == 403:
            return StoreError(what, f"Let an administrator of lakeFS grant this key the right to do so in {self.repository}.")
        if status in (404, 410):
            return Missing(what, "Look whether it was deleted on the server.")
        if status == 409:
            return Taken(what, "Do the same again.")
        if status == 412:
            return StoreError(what, "A hook or a condition on the server refused it; see the Actions page of the repository.")
        if "no space left" in said.lower():
            return DiskFull(what, "Free space where the server keeps its objects.")
        if status in BUSY:
            return ServerUnreachable(what, "Wait for the server, or look into its log; then do the same again.")
        return StoreError(what, "See what the server says.")


def _message(body: Any) -> str:
    """What an error's JSON says."""
    try:
        return str(json.loads(body)["message"])[:SHOWN]
    except (TypeError, ValueError, KeyError):
        return ""
