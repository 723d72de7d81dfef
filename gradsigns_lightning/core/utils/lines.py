"""An append-only file of lines that survives crashes, power cuts, full disks and a second process."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from gradsigns_lightning.core.utils.files import error_about, sync_folder

MAX_BYTES = 1 << 28  # the limit of an evidence bundle, which may have to hold the file
MAX_LINES = 1 << 20  # a line takes far more memory than its bytes
_RESERVED = 1 << 20
_CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems that cannot
_HOLE = b"\0"  # content of reserved space, and of a file whose data a power cut lost


def read_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Return the whole lines of a file, each with its line feed, and the rest of one that was cut off.

    The last line was cut off if it has no line feed or contains a hole: text holds no NUL, and each line is
    on the disk before the next is written.

    Raises:
        ValueError: the path is not a regular file, or the file has too many bytes or lines.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise error_about(path)("it is not a file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if data.count(b"\n") > MAX_LINES:
        raise ValueError(f"it has more than {MAX_LINES} lines")
    lines = io.BytesIO(data.rstrip(_HOLE)).readlines()
    tail = lines.pop() if lines and (_HOLE in lines[-1] or not lines[-1].endswith(b"\n")) else b""
    return lines, tail


def is_left_of(line: bytes, tail: bytes) -> bool:
    """Return whether a crash may have left ``tail`` of ``line``: its beginning or all of it, with holes."""
    return len(tail) <= len(line) and all(
        found in (wanted, 0) for found, wanted in zip(tail, line, strict=False)
    )


def _file_to_lock(path: Path) -> Path:
    """Return the resolved file; refuses links by which it or its lock could make or empty another file."""
    if path.is_symlink() and not path.exists():
        raise ValueError("it is a symbolic link to nowhere")
    file = path.resolve()
    file.parent.resolve(strict=True)  # otherwise the lock would create the folder
    if Path(f"{file}.lock").is_symlink():
        raise ValueError(f"its lock '{file.name}.lock' is a symbolic link")
    return file


class LineFile:
    """Appends lines to a file while no other process does.

    The lock is a file in the same folder, ``NAME.lock``, which is not removed. The target of a dangling link
    is not created, and the lock must not be a link.

    Args:
        path: the file; it is created if missing.

    Raises:
        ValueError: another process holds the file, it is a dangling link, its lock is a link, or
            :func:`read_lines` refuses it.
        OSError: the file cannot be created, locked or read.

    Attributes:
        lines: the whole lines of the file when it was opened.
        tail: the rest of a line that was cut off; the next line replaces it.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = _file_to_lock(Path(path))
        self._lock = FileLock(f"{self._path}.lock", thread_local=False)
        self._file: BinaryIO | None = None
        try:
            self._lock.acquire(timeout=0)
            self.lines, self.tail = read_lines(self._path) if self._path.exists() else ([], b"")
        except Timeout as error:
            raise ValueError("another process is writing to it") from error
        except BaseException:
            self.close()
            raise
        self._end = self._reserved = sum(map(len, self.lines))
        self._n_lines, self._longest = len(self.lines), max(map(len, self.lines), default=0)

    def reserve(self) -> None:
        """Reserve space for the next line, so that a full disk is noticed before there is anything to write.

        Raises:
            ValueError: the file would become too large, or have too many lines.
            OSError: there is no space.
        """
        needed = max(_RESERVED, 2 * self._longest)
        if self._end + needed > MAX_BYTES:
            raise ValueError(f"it would become larger than {MAX_BYTES} bytes")
        if self._n_lines >= MAX_LINES:
            raise ValueError(f"it would have more than {MAX_LINES} lines")
        if self._reserved - self._end < needed // 2 and hasattr(os, "posix_fallocate"):
            file = self._open()
            try:
                os.posix_fallocate(file.fileno(), self._end, needed)
            except OSError as error:
                self._cut()
                if error.errno not in _CANNOT_RESERVE:
                    raise
            else:
                self._reserved = self._end + needed

    def append(self, line: bytes) -> None:
        """Write a line and flush it to disk, completely or not at all.

        Raises:
            OSError: the line could not be written; the file is as before.
        """
        file, start = self._open(), self._end
        os.lseek(file.fileno(), start, os.SEEK_SET)
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(file.fileno(), left) :]
            self._end = start + len(line)
            os.fsync(file.fileno())
        except OSError:
            self._end = start
            self._cut()
            raise
        self._n_lines, self._longest = self._n_lines + 1, max(self._longest, len(line))

    def close(self) -> None:
        """Free reserved space, and release the lock."""
        if self._file is not None:
            self._cut()
            self._file.close()
            self._file = None
        self._lock.release()

    def _open(self) -> BinaryIO:
        """Open the file for writing, only once there is something to write: a refused file is not touched."""
        if self._file is None:
            is_new = not self._path.exists()
            self._file = self._path.open("x+b" if is_new else "r+b", buffering=0)
            if is_new:
                sync_folder(self._path.parent)
            self._cut()
        return self._file

    def _cut(self) -> None:
        """Truncate the file after its last whole line; should this fail, readers ignore the rest anyway."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            self._reserved = self._end
