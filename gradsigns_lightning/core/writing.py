"""Files that are either as before or whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from os import PathLike
from pathlib import Path


def write_file(path: str | PathLike[str], data: bytes, *, argument: str, overwrite: bool, mode: int = 0o600) -> None:
    """Write a file in one atomic step; a reader sees the old file or the whole new one, never a part.

    Args:
        path: the file.
        data: its content.
        argument: what the path is called in error messages.
        overwrite: whether it may replace a file.
        mode: its permissions; at no time are they wider.

    Raises:
        ValueError: the file exists and must not be replaced, or its folder does not exist or cannot be written to.
    """
    target = Path(path).expanduser()
    if target.exists() and not overwrite:
        raise ValueError(f"`{argument}` must not name an existing file, got '{target}'.")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"`{argument}` must name a file in an existing folder, got '{target}'.")
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # created with mode 0600
    except OSError as error:
        raise ValueError(f"`{argument}` must name a file in a folder that can be written to, got '{target}'.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
