"""The routes of the lakeFS stand-in (tests/infra/lakefs_server.py): one function for each operation of the REST API it serves."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import lakefs_sdk as api

from tests.infra.lakefs_state import Branch, Commit, Refused, Repository

ROUTES: list[tuple[str, str, Callable[..., None]]] = []
REPO = "/api/v1/repositories/{repository}"
BRANCH = f"{REPO}/branches/{{branch}}"
PMPU = f"{BRANCH}/staging/pmpu"


def route(method: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path), function))
        return function

    return add


def plain(model: Any) -> Any:
    if isinstance(model, list):
        return [plain(each) for each in model]
    return model if isinstance(model, str) else model.to_dict()


def shown(commit: Commit) -> api.Commit:
    return api.Commit(
        id=commit.id,
        parents=list(commit.parents),
        committer="tester",
        message=commit.message,
        creation_date=commit.created,
        meta_range_id=hashlib.sha256(repr(sorted(commit.tree)).encode()).hexdigest(),
        metadata=commit.metadata,
        generation=1,
        version=1,
    )


def described(repo: Repository) -> api.Repository:
    return api.Repository(id=repo.name, creation_date=repo.created, default_branch="main", storage_namespace=repo.namespace)


@route("GET", "/api/v1/config")
def get_config(http: Any, lakefs: Any) -> None:
    storage = api.StorageConfig(
        blockstore_type="mem",
        blockstore_namespace_example="mem://example/",
        blockstore_namespace_ValidityRegex="^mem://",
        pre_sign_support=lakefs.presign,
        pre_sign_support_ui=False,
        import_support=False,
        import_validity_regex="^mem://",
        pre_sign_multipart_upload=lakefs.multipart,
    )
    http.answer(200, api.Config(version_config=api.VersionConfig(version="stand-in"), storage_config=storage))


@route("GET", "/api/v1/user")
def get_current_user(http: Any, lakefs: Any) -> None:
    http.answer(200, api.CurrentUser(user=api.User(id="tester", creation_date=0)))


@route("POST", "/api/v1/repositories")
def create_repository(http: Any, lakefs: Any) -> None:
    wanted = http.parsed(api.RepositoryCreation)
    if wanted.name in lakefs.repositories:
        raise Refused(409, "repository exists")
    repo = lakefs.add_repository(wanted.name, wanted.storage_namespace)
    http.answer(201, described(repo))


@route("GET", REPO)
def get_repository(http: Any, lakefs: Any, repository: str) -> None:
    http.answer(200, described(lakefs.repository(repository)))


@route("DELETE", REPO)
def delete_repository(http: Any, lakefs: Any, repository: str) -> None:
    lakefs.repository(repository)
    del lakefs.repositories[repository]
    http.answer(204)


@route("GET", f"{REPO}/settings/branch_protection")
def get_branch_protection_rules(http: Any, lakefs: Any, repository: str) -> None:
    http.answer(200, [api.BranchProtectionRule(pattern=pattern) for pattern in sorted(lakefs.repository(repository).protected)])


@route("PUT", f"{REPO}/settings/branch_protection")
def set_branch_protection_rules(http: Any, lakefs: Any, repository: str) -> None:
    rules = [api.BranchProtectionRule.parse_obj(rule) for rule in http.json()]
    lakefs.repository(repository).protected = {rule.pattern for rule in rules}
    http.answer(204)


@route("GET", f"{REPO}/branches")
def list_branches(http: Any, lakefs: Any, repository: str) -> None:
    branches = lakefs.repository(repository).branches
    http.pages({name: api.Ref(id=name, commit_id=branch.head) for name, branch in branches.items()}, api.RefList)


@route("POST", f"{REPO}/branches")
def create_branch(http: Any, lakefs: Any, repository: str) -> None:
    repo, wanted = lakefs.repository(repository), http.parsed(api.BranchCreation)
    if not re.fullmatch(r"\w[-\w]*", wanted.name):
        raise Refused(400, "branch id invalid")
    if wanted.name in repo.branches:
        raise Refused(409, "branch already exists")
    repo.branches[wanted.name] = Branch(repo.commit_of(wanted.source).id)
    http.answer(201, repo.branches[wanted.name].head)


@route("DELETE", BRANCH)
def delete_branch(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    repo = lakefs.repository(repository)
    repo.branch(branch, write=True)
    del repo.branches[branch]
    http.answer(204)


@route("POST", f"{BRANCH}/commits")
def commit(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    repo, wanted = lakefs.repository(repository), http.parsed(api.CommitCreation)
    there = repo.branch(branch, write=True)
    if not there.staged and not wanted.allow_empty:
        raise Refused(400, "commit: no changes")
    tree = repo.commits[there.head].tree | there.staged
    made = repo.add((there.head,), tree, wanted.message, wanted.metadata, int(time.time()))
    there.head, there.staged = made.id, {}
    http.answer(201, shown(made))


@route("GET", f"{REPO}/commits/{{commit}}")
def get_commit(http: Any, lakefs: Any, repository: str, commit: str) -> None:
    http.answer(200, shown(lakefs.repository(repository).commit_of(commit)))


@route("POST", f"{REPO}/refs/{{source}}/merge/{{destination}}")
def merge_into_branch(http: Any, lakefs: Any, repository: str, source: str, destination: str) -> None:
    repo, wanted = lakefs.repository(repository), http.parsed(api.Merge)
    into, origin = repo.branch(destination), repo.commit_of(source)
    repo.check_actions(origin, destination, wanted.metadata, lakefs.blobs.__getitem__)
    tree = repo.merged(origin, into, wanted)
    made = repo.add((into.head, origin.id), tree, wanted.message or "", wanted.metadata, int(time.time()))
    into.head = made.id
    http.answer(200, api.MergeResult(reference=made.id))


@route("GET", f"{REPO}/refs/{{ref}}/commits")
def log_commits(http: Any, lakefs: Any, repository: str, ref: str) -> None:
    repo = lakefs.repository(repository)
    commits = [repo.commits[id] for id in repo.ancestors(repo.commit_of(ref).id)]
    http.pages({f"{place:08d}": shown(each) for place, each in enumerate(commits)}, api.CommitList)


@route("GET", f"{REPO}/tags")
def list_tags(http: Any, lakefs: Any, repository: str) -> None:
    tags = lakefs.repository(repository).tags
    http.pages({tag: api.Ref(id=tag, commit_id=commit) for tag, commit in tags.items()}, api.RefList)


@route("POST", f"{REPO}/tags")
def create_tag(http: Any, lakefs: Any, repository: str) -> None:
    repo, wanted = lakefs.repository(repository), http.parsed(api.TagCreation)
    if re.search(r"\.\.|//|@{|[\x00-\x20~^:?*\[\\]|[./]$|^/|\.lock$", wanted.id):
        raise Refused(400, "tag id invalid")
    if wanted.id in repo.tags and not wanted.force:
        raise Refused(409, "tag already exists")
    repo.tags[wanted.id] = repo.commit_of(wanted.ref).id
    http.answer(201, api.Ref(id=wanted.id, commit_id=repo.tags[wanted.id]))


@route("GET", f"{REPO}/tags/{{tag}}")
def get_tag(http: Any, lakefs: Any, repository: str, tag: str) -> None:
    repo = lakefs.repository(repository)
    if tag not in repo.tags:
        raise Refused(404, f"tag {tag} not found")
    http.answer(200, api.Ref(id=tag, commit_id=repo.tags[tag]))


@route("GET", f"{REPO}/refs/{{ref}}/objects/ls")
def list_objects(http: Any, lakefs: Any, repository: str, ref: str) -> None:
    tree = lakefs.repository(repository).tree(ref)
    keep = {} if http.query.get("user_metadata", "true").lower() == "true" else {"metadata": None}
    http.pages({path: stats.copy(update=keep) for path, stats in tree.items()}, api.ObjectStatsList)


@route("GET", f"{REPO}/refs/{{ref}}/objects/stat")
def stat_object(http: Any, lakefs: Any, repository: str, ref: str) -> None:
    http.answer(200, lakefs.repository(repository).object(ref, http.query["path"]))


@route("GET", f"{REPO}/refs/{{ref}}/objects")
def get_object(http: Any, lakefs: Any, repository: str, ref: str) -> None:
    stats = lakefs.repository(repository).object(ref, http.query["path"])
    if http.query.get("presign") == "true":
        return http.answer(302, None, {"Location": lakefs.sign(stats.physical_address)})
    if stats.physical_address not in lakefs.blobs:
        raise Refused(410, "object expired")
    http.send(lakefs.blobs[stats.physical_address])


@route("POST", f"{BRANCH}/objects")
def upload_object(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    there = lakefs.repository(repository).branch(branch, write=True)
    if http.headers.get("If-None-Match") == "*" and http.query["path"] in lakefs.repository(repository).tree(branch):
        raise Refused(412, "path already exists")
    start = "x-lakefs-meta-"
    metadata = {key.lower().removeprefix(start): value for key, value in http.headers.items() if key.lower().startswith(start)}
    address = lakefs.store(http.body)
    http.answer(201, lakefs.stage(there, http.query["path"], address, hashlib.md5(http.body).hexdigest(), metadata))


@route("GET", f"{BRANCH}/staging/backing")
def get_physical_address(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    lakefs.repository(repository).branch(branch, write=True)
    address = f"mem://{secrets.token_hex(16)}"
    url = lakefs.sign(address) if http.query.get("presign", "").lower() == "true" else None
    http.answer(200, api.StagingLocation(physical_address=address, presigned_url=url, presigned_url_expiry=int(time.time()) + 900))


@route("PUT", f"{BRANCH}/staging/backing")
def link_physical_address(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    there, wanted = lakefs.repository(repository).branch(branch, write=True), http.parsed(api.StagingMetadata)
    address = wanted.staging.physical_address
    if address not in lakefs.blobs or len(lakefs.blobs[address]) != wanted.size_bytes:
        raise Refused(400, "physical address is not linkable: nothing of this size is there")
    http.answer(200, lakefs.stage(there, http.query["path"], address, wanted.checksum, wanted.user_metadata))


@route("POST", PMPU)
def create_presign_multipart_upload(http: Any, lakefs: Any, repository: str, branch: str) -> None:
    lakefs.repository(repository).branch(branch, write=True)
    if not lakefs.multipart:
        raise Refused(501, "not implemented")
    upload = secrets.token_hex(8)
    address = f"mem://{secrets.token_hex(16)}"
    lakefs.uploads[upload] = (address, {})
    urls = [lakefs.sign(f"mem://{upload}/{part}") for part in range(1, int(http.query["parts"]) + 1)]
    http.answer(201, api.PresignMultipartUpload(upload_id=upload, physical_address=address, presigned_urls=urls))


@route("PUT", f"{PMPU}/{{upload}}")
def complete_presign_multipart_upload(http: Any, lakefs: Any, repository: str, branch: str, upload: str) -> None:
    there, wanted = lakefs.repository(repository).branch(branch, write=True), http.parsed(api.CompletePresignMultipartUpload)
    address, parts = lakefs.uploads[upload]
    tags = {number: hashlib.md5(part).hexdigest() for number, part in parts.items()}
    if address != wanted.physical_address or [(part.part_number, part.etag) for part in wanted.parts] != sorted(tags.items()):
        raise Refused(400, "the parts are not those that were uploaded")
    lakefs.store(b"".join(parts[number] for number in sorted(parts)), address)
    checksum = f"{hashlib.md5(''.join(tags.values()).encode()).hexdigest()}-{len(parts)}"
    http.answer(200, lakefs.stage(there, http.query["path"], address, checksum, wanted.user_metadata))
    del lakefs.uploads[upload]


@route("DELETE", f"{PMPU}/{{upload}}")
def abort_presign_multipart_upload(http: Any, lakefs: Any, repository: str, branch: str, upload: str) -> None:
    if http.parsed(api.AbortPresignMultipartUpload).physical_address != lakefs.uploads.get(upload, ("",))[0]:
        raise Refused(404, "no such upload")
    del lakefs.uploads[upload]
    http.answer(204)
