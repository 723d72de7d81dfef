"""Finding images near the decision boundary of the target class, where responses are most informative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gradsigns_lightning.verification.api.probes import blended, moved, permutation, shuffled
from gradsigns_lightning.verification.api.queries import QueryBudget

_SCREENING_BATCH = 8
_CONFIDENTLY_RECOGNISED, _SCREENED_IF_UNCLEAR = 0.75, 32
_RESOLVED = 20  # smallest useful 1 - p, in steps of the resolution
# in log-odds; rounding hides least at 0, and outside the class the mark is weaker
_LEAST_NEAR, _NEAR_OUTSIDE = 2.0, 1.0
_BISECTIONS = 6


@dataclass(frozen=True)
class ProbeImage:
    """An 8-bit image to probe around, and the log-odds of T there (NaN if only labels are known)."""

    image: Tensor
    log_odds: float


class BoundaryImages:
    """Finds images near the decision boundary, best first in each batch that is screened.

    Images on which the model is too confident, and all images where only labels come back, are blended
    towards an image of another class until the response turns. Each blend takes a different such image,
    because blends with the same image would share a deviation that is not the signature.

    Args:
        images: uint8 images of class T, ``(n, C, H, W)``.
        budget: queries the model.
        direction: direction ``(C, H, W)`` of a typical probe.
        step: grey levels of a typical probe.
    """

    def __init__(self, images: Tensor, budget: QueryBudget, *, direction: Tensor, step: int) -> None:
        self._images = images[permutation(len(images), "images")].clamp(step, 255 - step)
        self._budget, self._direction, self._step = budget, direction, step
        self._ready: list[ProbeImage] = []
        self._confident: list[Tensor] = []
        self._n_screened = 0
        self._other_class: list[Tensor] = []
        self._screening_pays = True
        self._outside = 0.0  # log-odds up to which an image counts as one of another class
        self._is_target = np.empty(0)

    def get(self, index: int) -> ProbeImage | None:
        """Return the probe image at ``index``, counted from 0, or None if there are fewer."""
        while len(self._ready) <= index or self._recognition_unclear:
            if self._budget.exhausted or not self._find_more():
                break
        return self._ready[index] if 0 <= index < len(self._ready) else None

    @property
    def size(self) -> int:
        """Number of probe images found so far."""
        return len(self._ready)

    @property
    def recognised(self) -> float:
        """Share of the natural images queried that the model classifies as T; NaN if none was answered."""
        return float(np.nanmean(self._is_target)) if np.isfinite(self._is_target).any() else math.nan

    @property
    def n_classified(self) -> int:
        """Number of natural images whose predicted class is known."""
        return int(np.isfinite(self._is_target).sum())

    @property
    def _recognition_unclear(self) -> bool:
        """Whether the first images do not show yet whether the model recognises images of the class."""
        return self.recognised < _CONFIDENTLY_RECOGNISED and self._n_screened < min(
            _SCREENED_IF_UNCLEAR, len(self._images)
        )

    @property
    def _resolved(self) -> float:
        """Log-odds up to which the responses' resolution shows small changes."""
        return max(0.0, -math.log(_RESOLVED * self._budget.parser.resolution))

    def _is_near(self, log_odds: Any) -> Any:
        return (log_odds >= self._outside - _NEAR_OUTSIDE) & (
            log_odds <= max(_LEAST_NEAR, self._resolved + 1)
        )

    def _find_more(self) -> bool:
        """Spend a few queries on finding probe images; return False when there is nothing left to try."""
        if self._recognition_unclear:
            self._screen()
        elif self._confident and self._other_class:
            self._blend_to_boundary(self._confident.pop(0), self._other_class.pop(0))
        elif self._n_screened < len(self._images) and (self._screening_pays or not self._confident):
            self._screen()
        elif self._confident:
            image = self._confident.pop(0)
            other_class = shuffled(image)
            if self._log_odds(other_class) <= self._outside:
                self._blend_to_boundary(image, other_class)
        else:
            return False
        return True

    def _screen(self) -> None:
        batch = self._images[self._n_screened : self._n_screened + _SCREENING_BATCH]
        self._n_screened += len(batch)
        log_odds, is_target = self._budget.query_and_classify(batch)
        self._is_target = np.append(self._is_target, is_target)
        only_labels = self._budget.parser.kind == "labels"
        if self._outside == 0 and np.isfinite(log_odds).any():
            # At a high temperature no class has half of the probability, yet most images are inside.
            self._outside = min(0.0, float(np.nanmedian(log_odds)))
        near = np.array([], dtype=np.int64) if only_labels else np.flatnonzero(self._is_near(log_odds))
        # The signature was embedded where the class's typical images are.
        typical = (
            np.median(log_odds[log_odds > self._outside])
            if (log_odds > self._outside).any()
            else self._outside
        )
        best_first = near[np.argsort(np.abs(log_odds[near] - min(typical, self._resolved)), kind="stable")]
        self._ready += [ProbeImage(batch[i], float(log_odds[i])) for i in best_first]
        other_class = [batch[i] for i in np.flatnonzero(log_odds <= self._outside)]
        self._other_class += other_class
        if len(near) == 0:
            self._confident += [batch[i] for i in np.flatnonzero(log_odds > self._outside)]
        self._screening_pays = len(near) > 0 or len(other_class) > 0

    def _blend_to_boundary(self, image: Tensor, other_class: Tensor) -> None:
        """Bisect between an image of class T and one of another class.

        Where only labels are known, the label of a typical probe decides instead of the image's own.
        """
        low, high = 0.0, 1.0
        only_labels = self._budget.parser.kind == "labels"
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            log_odds = self._log_odds(blended(image, other_class, middle))
            if only_labels and self._budget.parser.kind != "labels":
                self._blend_to_boundary(image, other_class)
                return
            if not only_labels and self._is_near(log_odds):
                self._ready.append(ProbeImage(blended(image, other_class, middle), log_odds))
                return
            low, high = (middle, high) if log_odds > self._outside else (low, middle)
        if only_labels and not self._budget.exhausted:
            self._budget.parser.settle()
            self._ready.append(ProbeImage(blended(image, other_class, (low + high) / 2), np.nan))

    def _log_odds(self, image: Tensor) -> float:
        if self._budget.parser.kind == "labels":
            image = moved(image, self._direction, self._step)
        return float(self._budget.query(image[None])[0])
