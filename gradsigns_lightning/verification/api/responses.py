"""Turning the responses of a prediction API into one number per image: the log-odds of the target class."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradsigns_lightning.verification.api.settings import Kind

Values = npt.NDArray[np.float64]

_FINEST = 1e-7  # float32 scores resolve 1 - p no better
_MAX_DECIMALS = 6  # probabilities are compared with their rounded values up to 1e-6
_SLACK = 0.5  # how far noise may move probabilities out of their range, and their sums away from one
_TOLERANCE = 1e-3
_TWO = 2


class ResponseParser:
    """Turns responses into the target class's log-odds, or into labels.

    The kind of response is found from the first responses and then fixed, unless it is given.

    Scores with only two distinct values (one-hot responses, probabilities rounded to integers) say no more
    than labels. A confident model's finely rounded probabilities look the same until an image near the
    decision boundary is queried, so such scores are read as labels until a third value shows, and for good
    once the boundary has been queried (:meth:`settle`).

    Args:
        target_class: class T.
        kind: kind of the responses; found from them by default. With ``"labels"`` scores are accepted, too.

    Attributes:
        kind: kind of the responses, None before the first.
    """

    def __init__(self, target_class: int, kind: Kind | None = None) -> None:
        self.target_class = target_class
        self.kind: Kind | None = kind
        self._settled = kind is not None
        self._is_labels: bool | None = None  # the form that responses arrive in
        self._n_classes: int | None = None
        self._two: Values = np.empty(0)  # the distinct scores so far, as long as there are two at most
        self._decimals = 0

    @property
    def resolution(self) -> float:
        """Smallest step between probabilities that the responses so far show."""
        return _FINEST if self.kind == "logits" else 10.0**-self._decimals

    def array(self, answer: Any, n_images: int) -> Values:
        """Return a response as an array: scores ``(n, n_classes)``, or labels ``(n,)``; NaN where missing.

        Raises:
            ValueError: the response is not such an array, or its number of images or classes is unexpected.
        """
        values = _as_array(answer)
        is_labels = values.ndim == 1
        expected = f"scores of shape ({n_images}, n_classes) or labels of shape ({n_images},)"
        if values.ndim not in (1, 2) or values.shape[0] != n_images:
            raise ValueError(f"`predict` must return {expected}, got shape {values.shape}.")
        if self._is_labels not in (None, is_labels) or (is_labels and self.kind not in (None, "labels")):
            form = "labels" if self._is_labels else "scores" if self.kind in (None, "labels") else self.kind
            raise ValueError(f"`predict` must return {form} throughout, got shape {values.shape}.")
        self._is_labels = is_labels
        if not is_labels:
            self._check_classes(values.shape[1])
        return values

    def settle(self) -> None:
        """Fix the kind: responses at the decision boundary are known now."""
        self._settled = True

    def log_odds(self, values: Values) -> Values:
        """Return the log-odds of T, shape ``(n,)``; NaN where they are unknown.

        For labels the values are 1 where T was predicted, else 0.
        """
        self._find_kind(values)
        if self.kind is None:
            return np.full(values.shape[0], np.nan)
        if self.kind == "labels":
            return self._labels(values)
        target = values[:, self.target_class]
        with np.errstate(all="ignore"):
            if self.kind == "logits":
                return target - _log_sum_exp(np.delete(values, self.target_class, axis=1))
            if self.kind == "log_probabilities":
                target = np.exp(target)
            self._note_decimals(target)
            half = self.resolution / 2
            return np.log(np.clip(target, half, 1)) - np.log(np.clip(1 - target, half, 1))

    def is_target(self, values: Values) -> Values:
        """Return 1 where class T was predicted, 0 where another was, NaN where none was; shape ``(n,)``."""
        is_target = self._labels(values)
        # Rounded to integers, all scores of an image can be zero: then no class is predicted.
        return (
            np.where(_all_equal(values), np.nan, is_target)
            if self.kind == "labels" and values.ndim == 2
            else is_target
        )

    def _labels(self, values: Values) -> Values:
        if values.ndim == 1:
            return np.where(np.isnan(values), np.nan, (values == self.target_class).astype(np.float64))
        answered = ~np.isnan(values).all(axis=1)
        is_target = self._has_highest_score(values)
        if self.kind == "labels":
            is_target &= ~_all_equal(values)
        return np.where(answered, is_target.astype(np.float64), np.nan)

    def _find_kind(self, values: Values) -> None:
        if self._settled:
            return
        if values.ndim == 1:
            self.kind, self._settled = "labels", True
            return
        found = np.union1d(self._two, values[~np.isnan(values)])
        if found.size == 0:
            return
        if found.size <= _TWO:
            self.kind, self._two = "labels", found
        else:
            self.kind, self._settled = _kind_of(values), True

    def _has_highest_score(self, values: Values) -> npt.NDArray[np.bool_]:
        """Tell where T has the highest score; if there are only two distinct scores, the higher one."""
        if self.kind != "labels" or not self._two.size:
            return np.asarray(np.where(np.isnan(values), -np.inf, values).argmax(axis=1) == self.target_class)
        target = values[:, self.target_class]
        # Both, because the lower score may be minus infinity; NaN is neither.
        return np.asarray((target == self._two[-1]) | (target > self._two.mean()))

    def _check_classes(self, n_classes: int) -> None:
        if n_classes <= self.target_class or n_classes < 2:
            raise ValueError(
                f"`predict` must return a score for every class, of which {self.target_class} is one, got "
                f"{n_classes} scores."
            )
        if self._n_classes not in (None, n_classes):
            raise ValueError(
                f"`predict` must return {self._n_classes} scores for each image throughout, got {n_classes}."
            )
        self._n_classes = n_classes

    def _note_decimals(self, probabilities: Values) -> None:
        known = probabilities[np.isfinite(probabilities)]
        while self._decimals < _MAX_DECIMALS:
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
        raise ValueError(
            f"`predict` must return an array of numbers, got {type(answer).__name__}."
        ) from error
    return np.where(np.isinf(values) & (values > 0), np.nan, values)


def _all_equal(values: Values) -> npt.NDArray[np.bool_]:
    """Tell in which rows all classes have the same score; false where one is missing."""
    return np.asarray(values.max(axis=1) == values.min(axis=1))


def _kind_of(values: Values) -> Kind:
    """Return the kind of scores ``(n, n_classes)``, of which at least one is not missing."""
    known = values[~np.isnan(values)]
    sums = values.sum(axis=1)
    # missing classes may hold the rest of the probability
    add_up = bool(np.isnan(sums).any()) or abs(float(sums.mean()) - 1) <= _SLACK
    if known.min() >= -_SLACK and known.max() <= 1 + _SLACK and add_up:
        return "probabilities"
    if (
        known.max() <= _TOLERANCE
        and np.nansum(np.exp(values), axis=1).max() <= 1 + values.shape[1] * _TOLERANCE
    ):
        return "log_probabilities"
    return "logits"


def _log_sum_exp(values: Values) -> Values:
    """Return the logarithm of the sum of exponentials along the second axis, without missing values."""
    largest = np.nanmax(
        np.where(np.isnan(values).all(axis=1, keepdims=True), -np.inf, values), axis=1, keepdims=True
    )
    result: Values = (largest + np.log(np.nansum(np.exp(values - largest), axis=1, keepdims=True)))[:, 0]
    return result
