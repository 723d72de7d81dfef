"""Files that are read within bounds, and written so that they are either as before or whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from os import PathLike
from pathlib import Path

from gradsigns_lightning.core.utils.checks import check_instance


class MissingFileError(FileNotFoundError, ValueError):
    """A file or folder that an argument names is not there, which is the user's error and the system's."""


class ExistingFileError(FileExistsError, ValueError):
    """A file that an argument names must not be replaced."""


# exactly these are about what was given
USER_ERRORS = (ValueError, TypeError, MissingFileError, ExistingFileError)


def error_about(path: str | PathLike[str]) -> type[ValueError]:
    """Return what to raise for a path at which there is not what should be: a :class:`MissingFileError` if there is nothing."""
    return ValueError if os.path.exists(path) else MissingFileError


def error_like(error: BaseException) -> type[ValueError]:
    """Return what to raise in place of ``error`` with a message that names the argument."""
    if isinstance(error, FileExistsError):
        return ExistingFileError
    return MissingFileError if isinstance(error, FileNotFoundError) else ValueError


def read_file(path: str | PathLike[str], *, argument: str, kind: str, max_bytes: int) -> bytes:
    """Read a small file that may come from a stranger; a pipe or a device is none.

    Args:
        path: the file.
        argument: what the path is called in error messages.
        kind: what the file is, for error messages: ``"key file"``.
        max_bytes: its largest size.

    Raises:
        MissingFileError: it is missing.
        ValueError: it is no regular file, cannot be read, or is larger.
        TypeError: ``path`` is no path.
    """
    check_instance(argument, path, (str, PathLike))
    file = Path(path).expanduser()
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            found = "a folder" if os.path.isdir(file) else "no regular file"
            raise ValueError(f"`{argument}` must name a readable {kind}, got {str(path)!r}: it is {found}.")
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as error:
        message = f"`{argument}` must name a readable {kind}, got {str(path)!r}: {error.strerror}."
        raise error_like(error)(message) from error
    if len(data) > max_bytes:
        raise ValueError(
            f"`{argument}` must name a {kind} of at most {max_bytes} bytes; {str(path)!r} is larger."
        )
    return data


def check_target(path: str | PathLike[str], *, argument: str, overwrite: bool) -> Path:
    """Return the file that :func:`atomic_write` would write; the errors are those that can be known before."""
    check_instance(argument, path, (str, PathLike))
    target = Path(path).expanduser()
    if os.path.lexists(target) and not overwrite:
        raise _existing(argument, target)
    # a folder, or a device
    if not os.path.isdir(target.parent) or (os.path.exists(target) and not os.path.isfile(target)):
        raise error_about(target.parent)(
            f"`{argument}` must name a file in an existing folder, got {str(target)!r}."
        )
    return target


def atomic_write(
    path: str | PathLike[str], data: bytes, *, argument: str, overwrite: bool, mode: int = 0o600
) -> None:
    """Write a file in one atomic step; a reader sees the old file, none, or the whole new one, never a part.

    Of several processes that write the same new file at once, one succeeds. Where the file system has no hard
    links (FAT, some network drives) that holds too, but a reader may see an empty file for a moment.

    Args:
        path: the file.
        data: its content.
        argument: what the path is called in error messages.
        overwrite: whether it may replace a file.
        mode: its permissions; at no time are they wider.

    Raises:
        ExistingFileError: the file exists and must not be replaced.
        MissingFileError: its folder does not exist.
        ValueError: its folder cannot be written to.
        OSError: writing failed, for example because the disk is full; all is as before.
    """
    target = check_target(path, argument=argument, overwrite=overwrite)
    try:
        # created with mode 0600
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        message = f"`{argument}` must name a file in a folder that can be written to, got {str(target)!r}."
        raise error_like(error)(message) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target) if overwrite else _move_to_new(temporary, target)
    except FileExistsError as error:
        raise _existing(argument, target) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """See the names of a folder's files to the disk; where a folder cannot be opened, the system does it by itself."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _existing(argument: str, target: Path) -> ValueError:
    if os.path.isdir(target):
        return ValueError(f"`{argument}` must name a file, got {str(target)!r}, which is a folder.")
    return ExistingFileError(f"`{argument}` must not name an existing file, got {str(target)!r}.")


def _move_to_new(temporary: str, target: Path) -> None:
    """Give a file the target's name if nobody has it; unlike renaming, linking and claiming never replace a file.

    Raises:
        FileExistsError: somebody has it.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            os.replace(temporary, target)
        except BaseException:
            os.unlink(target)
            raise
