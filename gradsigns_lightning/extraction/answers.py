"""What a prediction API answers, as one number per image: how sure it is of the target class."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Kind = Literal["probabilities", "log_probabilities", "logits", "labels"]
KINDS: tuple[Kind, ...] = ("probabilities", "log_probabilities", "logits", "labels")
Values = npt.NDArray[np.float64]

_FINEST = 1e-7  # float32 scores say no more about 1 - p
_MAX_DECIMALS = 6
_SLACK = 0.5  # by which noise may carry probabilities out of their range, and their sums away from one
_TOLERANCE = 1e-3


class AnswerReader:
    """Turns answers into the target class's log-odds, or into labels.

    The kind of answer is found in the first answers and then fixed, unless it is given.

    Args:
        target_class: class T.
        kind: kind of the answers; found from them when left out.

    Attributes:
        kind: kind of the answers, None before the first.
    """

    def __init__(self, target_class: int, kind: Kind | None = None) -> None:
        self.target_class = target_class
        self.kind: Kind | None = kind
        self._n_classes: int | None = None
        self._decimals = 0

    @property
    def resolution(self) -> float:
        """Smallest step between probabilities that the answers so far show."""
        return _FINEST if self.kind == "logits" or self._decimals > _MAX_DECIMALS else 10.0**-self._decimals

    def array(self, answer: Any, n_images: int) -> Values:
        """Return an answer as an array: scores ``(n, n_classes)``, or labels ``(n,)``; NaN where there is no answer.

        Raises:
            ValueError: the answer is no such array, or has another number of images or classes than before.
        """
        values = _as_array(answer)
        is_labels = values.ndim == 1
        expected = f"scores of shape ({n_images}, n_classes) or labels of shape ({n_images},)"
        if values.ndim not in (1, 2) or values.shape[0] != n_images:
            raise ValueError(f"`predict` must return {expected}, got shape {values.shape}.")
        if self.kind is not None and is_labels != (self.kind == "labels"):
            raise ValueError(f"`predict` must return {self.kind} throughout, got shape {values.shape}.")
        if not is_labels:
            self._check_classes(values.shape[1])
        return values

    def certainty(self, values: Values) -> Values:
        """Return the log-odds of T, shape ``(n,)``; for labels 1 where T was predicted, else 0. NaN where it is not known."""
        if self.kind is None:
            self.kind = _kind_of(values)
        if self.kind is None:
            return np.full(values.shape[0], np.nan)
        if self.kind == "labels":
            return np.where(np.isnan(values), np.nan, (values == self.target_class).astype(np.float64))
        target = values[:, self.target_class]
        with np.errstate(all="ignore"):
            if self.kind == "logits":
                return target - _log_sum_exp(np.delete(values, self.target_class, axis=1))
            if self.kind == "log_probabilities":
                target = np.exp(target)
            self._note_decimals(target)
            half = self.resolution / 2
            return np.log(np.clip(target, half, 1)) - np.log(np.clip(1 - target, half, 1))

    def names_target(self, values: Values) -> Values:
        """Return 1 where the answer is class T, 0 where it is another, NaN where there is none; shape ``(n,)``."""
        if values.ndim == 1:
            return np.where(np.isnan(values), np.nan, (values == self.target_class).astype(np.float64))
        answered = ~np.isnan(values).all(axis=1)
        named = np.where(np.isnan(values), -np.inf, values).argmax(axis=1) == self.target_class
        return np.where(answered, named.astype(np.float64), np.nan)

    def _check_classes(self, n_classes: int) -> None:
        if n_classes <= self.target_class or n_classes < 2:
            raise ValueError(
                f"`predict` must return a score for every class, of which {self.target_class} is one, got {n_classes} scores."
            )
        if self._n_classes not in (None, n_classes):
            raise ValueError(f"`predict` must return {self._n_classes} scores for each image throughout, got {n_classes}.")
        self._n_classes = n_classes

    def _note_decimals(self, probabilities: Values) -> None:
        known = probabilities[np.isfinite(probabilities)]
        while self._decimals <= _MAX_DECIMALS:
            scaled = known * 10.0**self._decimals
            if np.allclose(scaled, np.rint(scaled), rtol=0, atol=1e-6 * 10.0**self._decimals):
                return
            self._decimals += 1


def _as_array(answer: Any) -> Values:
    if isinstance(answer, Tensor):
        answer = answer.detach().to("cpu", torch.float64)
    try:
        values: Values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`predict` must return an array of numbers, got {type(answer).__name__}.") from error
    return np.where(np.isinf(values) & (values > 0), np.nan, values)


def _kind_of(values: Values) -> Kind | None:
    if values.ndim == 1:
        return "labels"
    known = values[~np.isnan(values)]
    if known.size == 0:
        return None
    sums = values.sum(axis=1)
    add_up = bool(np.isnan(sums).any()) or abs(float(sums.mean()) - 1) <= _SLACK  # missing classes may hold the rest
    if known.min() >= -_SLACK and known.max() <= 1 + _SLACK and add_up:
        return "probabilities"
    if known.max() <= _TOLERANCE and np.nansum(np.exp(values), axis=1).max() <= 1 + values.shape[1] * _TOLERANCE:
        return "log_probabilities"
    return "logits"


def _log_sum_exp(values: Values) -> Values:
    """Return the logarithm of the sum of exponentials along the second axis, missing ones left out."""
    largest = np.nanmax(np.where(np.isnan(values).all(axis=1, keepdims=True), -np.inf, values), axis=1, keepdims=True)
    result: Values = (largest + np.log(np.nansum(np.exp(values - largest), axis=1, keepdims=True)))[:, 0]
    return result
