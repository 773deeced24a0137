"""Whether an error means a full disk, whoever raised it: `if no_space(error): raise DiskFull(...) from error`."""

from __future__ import annotations

import errno

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
