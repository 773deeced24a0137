"""What can be wrong with a place that is written to, as an error that names it.

if no_space(error): raise DiskFull(...) from error       # whoever raised it
with writing(folder): ...                                # DiskFull or ConfigError instead of OSError
with replacing(path) as draft: ...                       # `path` is there whole or as it was
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ConfigError, DiskFull

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# libgit2, SQLite and safetensors give text only
NO_SPACE_TEXT = ("No space left on device", "disk is full", "quota exceeded", "File too large")


def no_space(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is among the causes of an error."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NO_SPACE) or any(text in str(error) for text in NO_SPACE_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(path: Path, remedy: str = "Name a place that exists and may be written to.") -> Iterator[None]:
    """For a block that does nothing but write at `path`: an OSError becomes DiskFull or ConfigError, naming it."""
    try:
        yield
    except OSError as error:
        if no_space(error):
            raise DiskFull(f"No space left for {path}.", "Free some space and try again.") from error
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", remedy) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, of the same ending, that takes its place when the block ends well and is gone when it does not.

    It is opened at once: a place that cannot be written to is known before the work. Raises ConfigError, DiskFull.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder.", "Name a file.")
    draft = path.with_name(f"{path.stem}.draft{path.suffix}")
    with writing(path):
        draft.write_bytes(b"")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        if no_space(error):
            raise DiskFull(f"No space left for {path}.", "Free some space and try again.") from error
        raise
    finally:
        draft.unlink(missing_ok=True)
