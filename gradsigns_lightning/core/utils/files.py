"""Files that are read within bounds, and written atomically."""

from __future__ import annotations

import contextlib
import os
import tempfile
from os import PathLike
from pathlib import Path

from gradsigns_lightning.core.utils.checks import check_instance


class MissingFileError(FileNotFoundError, ValueError):
    """A file or folder that an argument names does not exist; a user error and a system error."""


class ExistingFileError(FileExistsError, ValueError):
    """A file that an argument names must not be replaced."""


# Errors about arguments, as opposed to faults of the system or the package.
USER_ERRORS = (ValueError, TypeError, MissingFileError, ExistingFileError)


def error_about(path: str | PathLike[str]) -> type[ValueError]:
    """Return the error for a path that is not what it should be: a missing one has its own type."""
    return ValueError if os.path.exists(path) else MissingFileError


def error_like(error: BaseException) -> type[ValueError]:
    """Return the user error to raise in place of ``error``, with a message that names the argument."""
    if isinstance(error, FileExistsError):
        return ExistingFileError
    return MissingFileError if isinstance(error, FileNotFoundError) else ValueError


def read_file(path: str | PathLike[str], *, argument: str, kind: str, max_bytes: int) -> bytes:
    """Read a small regular file that may come from a stranger, not a pipe or a device.

    Args:
        path: the file.
        argument: name of the argument in error messages.
        kind: kind of file in error messages, for example ``"key file"``.
        max_bytes: largest size.

    Raises:
        MissingFileError: the file is missing.
        ValueError: it is not a regular file, cannot be read, or is larger.
        TypeError: ``path`` is not a path.
    """
    check_instance(argument, path, (str, PathLike))
    file = Path(path).expanduser()
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            found = "a folder" if os.path.isdir(file) else "not a regular file"
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
    """Return the file that :func:`atomic_write` would write; raises those errors that can be foreseen."""
    check_instance(argument, path, (str, PathLike))
    target = Path(path).expanduser()
    if os.path.lexists(target) and not overwrite:
        raise _existing(argument, target)
    # The target may be a folder or a device.
    if not os.path.isdir(target.parent) or (os.path.exists(target) and not os.path.isfile(target)):
        raise error_about(target.parent)(
            f"`{argument}` must name a file in an existing folder, got {str(target)!r}."
        )
    return target


def atomic_write(
    path: str | PathLike[str], data: bytes, *, argument: str, overwrite: bool, mode: int = 0o600
) -> None:
    """Write a file atomically: a reader sees the old file, none, or the whole new one, but never a part.

    If several processes write the same new file at once, one succeeds. On file systems without hard links
    (FAT, some network drives) that is so too, but a reader may see an empty file for a moment.

    Args:
        path: the file.
        data: its content.
        argument: name of the argument in error messages.
        overwrite: whether an existing file may be replaced.
        mode: permissions of the file; they are never wider, not even temporarily.

    Raises:
        ExistingFileError: the file exists and must not be replaced.
        MissingFileError: its folder does not exist.
        ValueError: its folder cannot be written to.
        OSError: writing failed, for example because the disk is full; nothing has changed.
    """
    target = check_target(path, argument=argument, overwrite=overwrite)
    try:
        # `mkstemp` creates it with mode 0600.
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
    """Flush a folder's entries to disk; systems on which a folder cannot be opened do so by themselves."""
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
    """Rename a file to a target that does not exist.

    Unlike a rename, a hard link or an exclusive creation never replaces a file.

    Raises:
        FileExistsError: the target exists.
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
