"""Images on which an answer says much: near the decision boundary of the target class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gradsigns_lightning.verification.api.probes import blended, moved, permutation, shuffled
from gradsigns_lightning.verification.api.queries import QueryBudget

_SCREENED_AT_ONCE = 8
_SURELY_RECOGNISED, _SCREENED_IN_DOUBT = 0.75, 32
_RESOLVED = 20  # smallest 1 - p of use, in steps of the resolution
# log-odds; rounding hides least at 0, and outside the class the mark is weaker
_LEAST_NEAR, _NEAR_OUTSIDE = 2.0, 1.0
_BISECTIONS = 6


@dataclass(frozen=True)
class ProbeImage:
    """An 8-bit image to probe around; ``log_odds`` is the log-odds of T there (NaN if only labels are known)."""

    image: Tensor
    log_odds: float


class BoundaryImages:
    """Finds images near the decision boundary, best first in each group that is screened.

    Images of which the model is too sure, and all images where only labels come back, are blended towards one
    that it does not take for class T until the answer turns. Each blend takes another such image, because
    what the probes around blends with the same image have in common is not the signature.

    Args:
        images: uint8 images of class T, ``(n, C, H, W)``.
        budget: asks the model.
        direction: a direction ``(C, H, W)`` that stands for a typical probe.
        step: grey levels of a typical probe.
    """

    def __init__(self, images: Tensor, budget: QueryBudget, *, direction: Tensor, step: int) -> None:
        self._images = images[permutation(len(images), "images")].clamp(step, 255 - step)
        self._budget, self._direction, self._step = budget, direction, step
        self._ready: list[ProbeImage] = []
        self._confident: list[Tensor] = []
        self._n_screened = 0
        self._other_class: list[Tensor] = []
        self._worthwhile = True
        self._outside = 0.0  # log-odds up to which an image counts as one of another class
        self._named = np.empty(0)

    def get(self, index: int) -> ProbeImage | None:
        """Return the probe image number ``index``, or None if there are not so many."""
        while (
            (len(self._ready) <= index or self._doubtful) and not self._budget.exhausted and self._find_more()
        ):
            pass
        return self._ready[index] if 0 <= index < len(self._ready) else None

    @property
    def size(self) -> int:
        """Number of probe images found so far."""
        return len(self._ready)

    @property
    def recognised(self) -> float:
        """Share of the natural images asked about that the model takes for class T, in [0, 1]; NaN if it said of none."""
        return float(np.nanmean(self._named)) if np.isfinite(self._named).any() else math.nan

    @property
    def n_named(self) -> int:
        """Number of natural images of which the model said what it takes them for."""
        return int(np.isfinite(self._named).sum())

    @property
    def _doubtful(self) -> bool:
        """Whether the first images leave it open whether the model takes the class's images for the class."""
        return self.recognised < _SURELY_RECOGNISED and self._n_screened < min(
            _SCREENED_IN_DOUBT, len(self._images)
        )

    @property
    def _resolved(self) -> float:
        """Log-odds up to which the answers' resolution shows how the model moves."""
        return max(0.0, -math.log(_RESOLVED * self._budget.parser.resolution))

    def _is_near(self, log_odds: Any) -> Any:
        return (log_odds >= self._outside - _NEAR_OUTSIDE) & (
            log_odds <= max(_LEAST_NEAR, self._resolved + 1)
        )

    def _find_more(self) -> bool:
        """Spend a few queries on finding probe images; return False when there is nothing left to try."""
        if self._doubtful:
            self._screen()
        elif self._confident and self._other_class:
            self._to_the_boundary(self._confident.pop(0), self._other_class.pop(0))
        elif self._n_screened < len(self._images) and (self._worthwhile or not self._confident):
            self._screen()
        elif self._confident:
            image = self._confident.pop(0)
            other_class = shuffled(image)
            if self._log_odds(other_class) <= self._outside:
                self._to_the_boundary(image, other_class)
        else:
            return False
        return True

    def _screen(self) -> None:
        batch = self._images[self._n_screened : self._n_screened + _SCREENED_AT_ONCE]
        self._n_screened += len(batch)
        log_odds, named = self._budget.query_and_name(batch)
        self._named = np.append(self._named, named)
        only_labels = self._budget.parser.kind == "labels"
        if self._outside == 0 and np.isfinite(log_odds).any():
            # At a high temperature no class has half of the probability; most images are inside all the same.
            self._outside = min(0.0, float(np.nanmedian(log_odds)))
        near = np.array([], dtype=np.int64) if only_labels else np.flatnonzero(self._is_near(log_odds))
        # The signature is embedded where the class's typical images are.
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
        self._worthwhile = len(near) > 0 or len(other_class) > 0

    def _to_the_boundary(self, image: Tensor, other_class: Tensor) -> None:
        """Bisect between an image of class T and one of another class; where only labels are known, a typical probe's label counts."""
        low, high = 0.0, 1.0
        only_labels = self._budget.parser.kind == "labels"
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            log_odds = self._log_odds(blended(image, other_class, middle))
            if only_labels and self._budget.parser.kind != "labels":
                self._to_the_boundary(image, other_class)
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
