"""Querying a prediction API within a budget, with a journal from which an interrupted reading continues."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.utils.canonical import json_of
from gradsigns_lightning.core.utils.checks import check_int
from gradsigns_lightning.core.utils.files import error_like
from gradsigns_lightning.core.utils.lines import LineFile, is_left_of, read_lines
from gradsigns_lightning.verification.api.responses import ResponseParser, Values
from gradsigns_lightning.verification.images import normalize

Oracle = Callable[[Tensor], Any]
_FORMAT = "gradsigns-journal/1"
_MAX_VALUES = 1 << 24  # JSON values of a journal; below a gigabyte in memory
# values that a character stands for; an object takes the memory of six numbers
_VALUES = {b",": 1, b'"': 1, b"[": 2, b"{": 6}


def normalized(predict: Oracle, key: SignatureKey) -> Oracle:
    """Wrap an oracle that expects inputs normalized as the key says, so that it takes raw images."""
    return lambda images: predict(normalize(images, key))


class Transcript:
    """Responses in the order in which they came, each with the digest of the images that were queried.

    Args:
        lines: a header and one record for each batch, as JSON types; empty for a new reading.
        reading: what identifies the reading: commitment, images and settings.
        name: what error messages call the transcript.

    Raises:
        ValueError: the lines are of another reading.
    """

    def __init__(self, lines: Sequence[Any], reading: dict[str, Any], *, name: str) -> None:
        self.header = {"format": _FORMAT, **reading}
        if lines and lines[0] != self.header:
            raise ValueError(
                f"`journal` must be new or of the same reading, got {name!r} of another key, images or "
                "settings."
            )
        self._recorded, self._name = deque(lines[1:]), name

    @property
    def n_left(self) -> int:
        """Number of recorded responses that have not been used yet."""
        return len(self._recorded)

    def recorded(self, digest: str) -> Any:
        """Return the recorded response to the next batch, or None when there is none left."""
        if not self._recorded:
            return None
        record = self._recorded.popleft()
        try:
            if record["images"] == digest:
                return [_from_json(row) for row in record["answer"]]
        except (TypeError, KeyError, ValueError, OverflowError):
            pass
        raise ValueError(
            f"`journal`: {str(self._name)!r} does not fit this reading: it was edited, or made by a version "
            "that queries other images. Name another file to query again."
        )

    def record(self, digest: str, values: Values) -> None:
        """Record a new response."""

    def prepare(self) -> None:
        """Prepare to record a response, before its images are queried."""

    def close(self) -> None:
        """Release the file, if there is one."""

    def __enter__(self) -> Transcript:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Journal(Transcript):
    """A transcript in a file, one JSON line for each batch, that survives crashes, power cuts and full disks.

    The file is only appended to, in space that is reserved before a batch is queried. What a crash left of a
    line is ignored, and overwritten by the next response. During a reading no other one can write to the
    file; a lock file ``NAME.lock`` lies next to it.

    Args:
        path: the file; it is created, or continued if it is of the same reading.
        reading: what identifies the reading.

    Raises:
        ValueError: the file is of another reading, not a journal, in use, or cannot be written to.
    """

    def __init__(self, path: str | PathLike[str], reading: dict[str, Any]) -> None:
        self._path = path
        try:
            self._file = LineFile(Path(path).expanduser())
        except (OSError, ValueError, RuntimeError) as error:
            message = f"`journal` must name a file in a writable folder, got {str(path)!r}: {_why(error)}."
            raise error_like(error)(message) from error
        try:
            super().__init__(_parse(self._file.lines, path), reading, name=str(path))
            self._n_kept = max(0, len(self._file.lines) - 1)
            if not self._file.lines:
                self._begin()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Reserve space for the next response.

        Raises:
            ValueError: there is no space.
        """
        with self._kept():
            self._file.reserve()

    def record(self, digest: str, values: Values) -> None:
        """Append a response and sync it to the disk.

        Raises:
            ValueError: it cannot be written; the journal is as before.
        """
        with self._kept():
            self._file.append(_line({"images": digest, "answer": _to_json(values)}))
        self._n_kept += 1

    def close(self) -> None:
        """Let other readings use the file."""
        self._file.close()

    def _begin(self) -> None:
        header = _line(self.header)
        if not is_left_of(header, self._file.tail):
            raise ValueError(f"`journal` must name a journal or no file, got {str(self._path)!r}.")
        with self._kept():
            self._file.append(header)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Say how many responses are kept if the file cannot grow."""
        try:
            yield
        except (OSError, ValueError) as error:
            kept = f"the answers to {self._n_kept} calls are kept; the same command continues from them"
            raise ValueError(
                f"`journal`: {str(self._path)!r} cannot be written to: {_why(error)}; {kept}."
            ) from error


def read_journal(path: str | PathLike[str]) -> list[Any]:
    """Return the lines of a journal as JSON types, without a last one that was cut off.

    Raises:
        FileNotFoundError: there is no such file; this error is a :class:`ValueError`, too.
        ValueError: the file cannot be read, is not a journal, or is too large.
    """
    try:
        lines, _ = read_lines(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError) as error:
        raise error_like(error)(
            f"`journal` must name a journal, got {str(path)!r}: {_why(error)}."
        ) from error
    return _parse(lines, path)


def _parse(lines: Sequence[bytes], path: str | PathLike[str]) -> list[Any]:
    n_values = len(lines) + sum(line.count(mark) * n for line in lines for mark, n in _VALUES.items())
    if n_values > _MAX_VALUES:
        raise ValueError(
            f"`journal` must hold at most {_MAX_VALUES} values, got {str(path)!r} with about {n_values}."
        )
    try:
        return [json_of(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`journal` must name a journal or no file, got {str(path)!r}; it was edited or is something "
            "else."
        ) from error


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


class QueryBudget:
    """Queries an oracle with 8-bit images until the budget is spent.

    Args:
        predict: the oracle.
        parser: interprets the oracle's responses.
        max_queries: most images that may be sent to the oracle.
        batch_size: most images in one call.
        transcript: where responses are recorded and replayed from, or None.
    """

    def __init__(
        self,
        predict: Oracle,
        parser: ResponseParser,
        *,
        max_queries: int,
        batch_size: int,
        transcript: Transcript | None,
    ) -> None:
        self.parser = parser
        self.n_queries = 0
        self.max_queries = check_int("max_queries", max_queries, minimum=1)
        self._predict, self._transcript = predict, transcript
        self._batch_size = check_int("batch_size", batch_size, minimum=1)

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent."""
        return self.n_queries >= self.max_queries

    def query(self, images: Tensor) -> Values:
        """Return :meth:`ResponseParser.log_odds` for the responses to uint8 images ``(n, C, H, W)``.

        Images that the model or the budget left unanswered have NaN.
        """
        return self.query_and_classify(images)[0]

    def query_and_classify(self, images: Tensor) -> tuple[Values, Values]:
        """Return what :meth:`query` does, and whether the model classifies each image as T (1, 0, or NaN)."""
        log_odds, is_target = np.full((2, len(images)), np.nan)
        batches = torch.split(images[: self.max_queries - self.n_queries], self._batch_size)
        responses = [self._response(batch) for batch in batches if len(batch)]
        if responses:
            # Parsed together, because the later ones may show what kind all of them are.
            values = np.concatenate(responses)
            log_odds[: len(values)] = self.parser.log_odds(values)
            is_target[: len(values)] = self.parser.is_target(values)
        return log_odds, is_target

    def _response(self, batch: Tensor) -> Values:
        digest = hashlib.sha256(batch.contiguous().numpy().tobytes()).hexdigest()
        recorded = self._transcript.recorded(digest) if self._transcript else None
        if recorded is not None:
            values = self.parser.array(recorded, len(batch))
        else:
            if self._transcript:
                self._transcript.prepare()
            values = self.parser.array(self._predict(batch.to(torch.float32) / 255), len(batch))
            if self._transcript:
                self._transcript.record(digest, values)
        self.n_queries += len(batch)
        return values


def _to_json(values: Values) -> list[Any]:
    return (
        [_to_json(row) for row in values]
        if values.ndim == 2
        else [v if np.isfinite(v) else repr(v) for v in values.tolist()]
    )


def _from_json(row: Any) -> Any:
    return [float(v) for v in row] if isinstance(row, list) else float(row)
