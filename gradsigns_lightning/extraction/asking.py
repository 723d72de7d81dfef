"""Asking a prediction API within a budget, with a journal from which an interrupted reading goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsigns_lightning.core.checks import check_int
from gradsigns_lightning.core.key import SignatureKey
from gradsigns_lightning.extraction.answers import AnswerReader, Values
from gradsigns_lightning.extraction.white_box import normalise

Oracle = Callable[[Tensor], Any]
_FORMAT = "gradsigns-journal/1"


def normalised(predict: Oracle, key: SignatureKey) -> Oracle:
    """Let an oracle that expects normalised inputs take raw images: subtract the key's mean, divide by its deviation."""
    return lambda images: predict(normalise(images, key))


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
            raise ValueError(f"`journal` must be new or of the same reading, got '{name}' of another key, images or settings.")
        self._recorded, self._name = list(lines[1:]), name

    @property
    def n_left(self) -> int:
        """Recorded answers that were not asked for yet."""
        return len(self._recorded)

    def recorded(self, digest: str) -> Any:
        """Return the recorded answer to the next batch, or None when there is none left."""
        if not self._recorded:
            return None
        record = self._recorded.pop(0)
        try:
            if record["images"] == digest:
                return [_from_json(row) for row in record["answer"]]
        except (TypeError, KeyError, ValueError):
            pass
        raise ValueError(f"`journal`: '{self._name}' does not fit this reading; it was edited or made by another version.")

    def record(self, digest: str, answer: Values) -> None:
        """Take note of a new answer."""


class Journal(Transcript):
    """A transcript in a file, one JSON line for each batch; a line cut off by a crash is dropped.

    Args:
        path: the file; it is made, or continued if it is of the same reading.
        reading: what identifies the reading.

    Raises:
        ValueError: the file is of another reading, or no journal.
    """

    def __init__(self, path: str | PathLike[str], reading: dict[str, Any]) -> None:
        self._path = Path(path).expanduser()
        lines = read_journal(self._path) if self._path.exists() else []
        super().__init__(lines, reading, name=str(path))
        self._rewrite([self.header, *lines[1:]])

    def record(self, digest: str, answer: Values) -> None:
        """Append an answer and see it to the disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": digest, "answer": _to_json(answer)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, lines: list[Any]) -> None:
        try:
            temporary = self._path.with_name(self._path.name + ".new")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            raise ValueError(f"`journal` must name a file in a writable folder, got '{self._path}': {error.strerror}.") from error


def read_journal(path: str | PathLike[str]) -> list[Any]:
    """Return the lines of a journal as JSON types, without one that was cut off.

    Raises:
        ValueError: the file cannot be read or is no journal.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`journal` must name a journal or no file, got '{path}'.") from error


class Asker:
    """Asks an oracle about 8-bit images until the budget is spent.

    Args:
        predict: the oracle.
        reader: what its answers mean.
        max_queries: images that may be asked about.
        batch_size: images in one call.
        transcript: where answers are kept and taken from, or None.
    """

    def __init__(
        self, predict: Oracle, reader: AnswerReader, *, max_queries: int, batch_size: int, transcript: Transcript | None
    ) -> None:
        self.reader = reader
        self.n_queries = 0
        self.max_queries = check_int("max_queries", max_queries, minimum=1)
        self._predict, self._transcript = predict, transcript
        self._batch_size = check_int("batch_size", batch_size, minimum=1)

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent."""
        return self.n_queries >= self.max_queries

    def ask(self, images: Tensor) -> Values:
        """Return how sure the model is of T on uint8 images ``(n, C, H, W)``; NaN for what it or the budget left unanswered."""
        certainty = np.full(len(images), np.nan)
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size][: self.max_queries - self.n_queries]
            if len(batch):
                certainty[start : start + len(batch)] = self.reader.certainty(self._answer(batch))
        return certainty

    def _answer(self, batch: Tensor) -> Values:
        digest = hashlib.sha256(batch.contiguous().numpy().tobytes()).hexdigest()
        recorded = self._transcript.recorded(digest) if self._transcript else None
        if recorded is not None:
            answer = self.reader.array(recorded, len(batch))
        else:
            answer = self.reader.array(self._predict(batch.to(torch.float32) / 255), len(batch))
            if self._transcript:
                self._transcript.record(digest, answer)
        self.n_queries += len(batch)
        return answer


def _to_json(values: Values) -> list[Any]:
    return [_to_json(row) for row in values] if values.ndim == 2 else [v if np.isfinite(v) else repr(v) for v in values.tolist()]


def _from_json(row: Any) -> Any:
    return [float(v) for v in row] if isinstance(row, list) else float(row)
