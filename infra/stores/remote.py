"""DVC as a library, and its remote: a second place for a registry's objects, a folder or an S3-compatible bucket.

    remote = Remote(root, "s3://models/onereward")
    remote.push(cache, objects, meter)      # complete when every object is there at its full length
    remote.fetch(cache, objects, drafts, meter)

Credentials come from the environment alone, as boto3 reads it (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...; AWS_ENDPOINT_URL names another
server than AWS). The address is in the registry's `.dvc/config`, so `dvc pull`, `dvc push` and `dvc get` use the same place.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra.disk import no_space
from infra.stores.cache import Cache
from infra.stores.content import Meter
from models.errors import ConfigError, DiskFull, OneRewardError, ServerUnreachable, StoreError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

REMOTE = "store"  # its name in DVC's configuration
# Hard links first: `dvc checkout` in the registry then copies nothing.
DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
    check_update = false
[cache]
    dir = cache
    type = "hardlink,reflink,copy"
"""
Objects = dict[str, int]  # id -> bytes


class Remote:
    """The remote at `url`: `s3://bucket/prefix` or a folder. Raises ConfigError for one that holds credentials or is of another kind."""

    def __init__(self, root: Path, url: str):
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ConfigError("The address of the store's remote holds more than a place.", "Give credentials in the environment.")
        if not (parts.scheme == "s3" and parts.netloc) and not Path(url).is_absolute():
            raise ConfigError(f"{url!r} is no remote.", "Name s3://bucket/prefix or an absolute folder.")
        self.root, self.url = root, url

    @property
    def config(self) -> str:
        """DVC's configuration of a registry that has it."""
        named = DVC_CONFIG.replace("[core]\n", f"[core]\n    remote = {REMOTE}\n")
        return f"""{named}['remote "{REMOTE}"']\n    url = {self.url}\n"""

    def push(self, cache: Cache, objects: Objects, meter: Meter) -> None:
        """Copy what the remote lacks or holds cut short; lists of files last, so that one never names what is not there.

        Raises StoreError when the remote refuses, ServerUnreachable, DiskFull.
        """
        from dvc_objects.fs.local import LocalFileSystem

        with self._opened() as remote:
            for of_lists in (False, True):
                wanted = {key: size for key, size in objects.items() if key.endswith(".dir") == of_lists}
                if lacking := self._lacking(remote, wanted):
                    local = [str(cache.path(key)) for key in lacking]
                    remote.add(local, LocalFileSystem(), lacking, check_exists=False, callback=_callback(meter))
                if still := self._lacking(remote, {key: objects[key] for key in lacking}):
                    raise StoreError(
                        f"{self.url} does not hold all of {still[0]} after its upload.", "Try again; see the remote's own log."
                    )

    def fetch(self, cache: Cache, objects: Objects, drafts: Path, meter: Meter) -> None:
        """Copy objects into the cache by way of the folder `drafts`; those the remote does not hold are left out. Raises as `push`."""
        with self._opened() as remote:
            absent = set(self._lacking(remote, objects))
            for key in objects:
                if key not in absent:
                    remote.fs.get_file(remote.oid_to_path(key), str(drafts / key), callback=_callback(meter).branched())
                    cache.take(drafts / key, key)

    def _lacking(self, remote: HashFileDB, objects: Objects) -> list[str]:
        """The objects that are not there at their full length."""
        found = remote.fs.info([remote.oid_to_path(key) for key in objects], return_exceptions=True) if objects else []
        for info in found:
            if isinstance(info, Exception) and not isinstance(info, FileNotFoundError):
                raise info
        return [key for key, info in zip(objects, found, strict=True) if isinstance(info, Exception) or info["size"] != objects[key]]

    @contextmanager
    def _opened(self) -> Iterator[HashFileDB]:
        """The remote's objects, every failure told in this project's words."""
        try:
            with opened(self.root) as repo:
                yield repo.cloud.get_remote_odb(REMOTE)
        except OneRewardError:
            raise
        except Exception as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if no_space(error):
                raise DiskFull(f"No space left at {self.url}.", "Free space there; the store is as it was.") from error
            if kinds & {"ConnectionError", "HTTPClientError", "TimeoutError"}:
                raise ServerUnreachable(f"{self.url} does not answer.", "Check AWS_ENDPOINT_URL and the network, and try again.") from error
            if kinds & {"PermissionError", "NoCredentialsError"} or getattr(error, "errno", None) == errno.EROFS:
                what = f"{self.url} may not be read and written with the credentials in the environment: {str(error).rstrip('.')}."
                raise StoreError(what, "Renew them, or ask for the right to write there; the store is as it was.") from error
            raise StoreError(
                f"{self.url} cannot be used: {str(error).rstrip('.')}.", "See the cause above; the store is as it was."
            ) from error


@contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """DVC's view of a registry, opened anew: a long-lived one goes stale."""
    from dvc.repo import Repo

    quiet_dvc()
    # Where DVC remembers file hashes; inside the registry, so that a full disk elsewhere or another user's cache is no matter.
    repo = Repo(str(root), config={"core": {"site_cache_dir": str(root / ".dvc" / "tmp" / "site")}})
    try:
        yield repo
    finally:
        repo.close()


def quiet_dvc() -> None:
    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # it prints hints and bars; its errors reach us as exceptions


def _callback(meter: Meter) -> Any:
    """fsspec's way to be told of bytes."""
    from fsspec.callbacks import Callback

    class OfFile(Callback):
        def relative_update(self, inc: int = 1) -> None:
            meter.add(inc)

    class OfFiles(Callback):
        def branched(self, *_: str, **__: Any) -> Callback:
            return OfFile()

    return OfFiles()
