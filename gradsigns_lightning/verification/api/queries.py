"""Asking a prediction API within a budget, with a journal from which an interrupted reading goes on."""

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
_MAX_VALUES = 1 << 24  # of JSON: below a gigabyte in memory
# what a mark stands for: an object takes the memory of six numbers
_VALUES = {b",": 1, b'"': 1, b"[": 2, b"{": 6}


def normalized(predict: Oracle, key: SignatureKey) -> Oracle:
    """Let an oracle that expects normalized inputs take raw images: subtract the key's mean, divide by its deviation."""
    return lambda images: predict(normalize(images, key))


class Transcript:
    """Answers in the order in which they came, each with the digest of the images that were asked about.

    Args:
        lines: a header and one record for each batch, as JSON types; empty for a new reading.
        reading: what identifies the reading: commitment, images and settings.
        name: what error messages call it.

    Raises:
        ValueError: the lines are of another reading.
    """

    def __init__(self, lines: Sequence[Any], reading: dict[str, Any], *, name: str) -> None:
        self.header = {"format": _FORMAT, **reading}
        if lines and lines[0] != self.header:
            raise ValueError(
                f"`journal` must be new or of the same reading, got {name!r} of another key, "
                f"images or settings."
            )
        self._recorded, self._name = deque(lines[1:]), name

    @property
    def n_left(self) -> int:
        """Recorded answers that were not asked for yet."""
        return len(self._recorded)

    def recorded(self, digest: str) -> Any:
        """Return the recorded answer to the next batch, or None when there is none left."""
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
            f"that asks about "
            "other images. Name another file to ask anew."
        )

    def record(self, digest: str, answer: Values) -> None:
        """Take note of a new answer."""

    def prepare(self) -> None:
        """Get ready to take note of an answer, before it is asked for."""

    def close(self) -> None:
        """Let go of the file, if there is one."""

    def __enter__(self) -> Transcript:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Journal(Transcript):
    """A transcript in a file, one JSON line for each batch, that no crash, power cut or full disk takes an answer from.

    It is only appended to, in space that is reserved before a question is asked. What a crash left of a line
    is ignored, and overwritten by the next answer. While a reading goes on, no other one can write to it; a
    lock lies beside it as ``NAME.lock``.

    Args:
        path: the file; it is made, or continued if it is of the same reading.
        reading: what identifies the reading.

    Raises:
        ValueError: the file is of another reading, no journal, in use, or cannot be written to.
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
        """Reserve space for the next answer.

        Raises:
            ValueError: there is none.
        """
        with self._kept():
            self._file.reserve()

    def record(self, digest: str, answer: Values) -> None:
        """Append an answer and see it to the disk.

        Raises:
            ValueError: it cannot be written; the journal is as before.
        """
        with self._kept():
            self._file.append(_line({"images": digest, "answer": _to_json(answer)}))
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
        """Say what became of the answers if the file cannot grow."""
        try:
            yield
        except (OSError, ValueError) as error:
            kept = f"the answers to {self._n_kept} calls are kept; the same command goes on from them"
            raise ValueError(
                f"`journal`: {str(self._path)!r} cannot be written to: {_why(error)}; {kept}."
            ) from error


def read_journal(path: str | PathLike[str]) -> list[Any]:
    """Return the lines of a journal as JSON types, without one that was cut off.

    Raises:
        FileNotFoundError: there is no such file; it is a :class:`ValueError` too.
        ValueError: it cannot be read, is no journal, or is too large for one.
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
            f"else."
        ) from error


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


class QueryBudget:
    """Asks an oracle about 8-bit images until the budget is spent.

    Args:
        predict: the oracle.
        parser: what its answers mean.
        max_queries: images that may be asked about.
        batch_size: images in one call.
        transcript: where answers are kept and taken from, or None.
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
        """Return how sure the model is of T on uint8 images ``(n, C, H, W)``; NaN for what it or the budget left unanswered."""
        return self.query_and_name(images)[0]

    def query_and_name(self, images: Tensor) -> tuple[Values, Values]:
        """Return the same, and whether the model takes each image for class T (1, 0, or NaN); both of shape ``(n,)``."""
        log_odds, named = np.full((2, len(images)), np.nan)
        batches = torch.split(images[: self.max_queries - self.n_queries], self._batch_size)
        answers = [self._answer(batch) for batch in batches if len(batch)]
        if answers:
            # Together, because the later ones may tell what kind all of them are.
            values = np.concatenate(answers)
            log_odds[: len(values)] = self.parser.log_odds(values)
            named[: len(values)] = self.parser.names_target(values)
        return log_odds, named

    def _answer(self, batch: Tensor) -> Values:
        digest = hashlib.sha256(batch.contiguous().numpy().tobytes()).hexdigest()
        recorded = self._transcript.recorded(digest) if self._transcript else None
        if recorded is not None:
            answer = self.parser.array(recorded, len(batch))
        else:
            if self._transcript:
                self._transcript.prepare()
            answer = self.parser.array(self._predict(batch.to(torch.float32) / 255), len(batch))
            if self._transcript:
                self._transcript.record(digest, answer)
        self.n_queries += len(batch)
        return answer


def _to_json(values: Values) -> list[Any]:
    return (
        [_to_json(row) for row in values]
        if values.ndim == 2
        else [v if np.isfinite(v) else repr(v) for v in values.tolist()]
    )


def _from_json(row: Any) -> Any:
    return [float(v) for v in row] if isinstance(row, list) else float(row)
