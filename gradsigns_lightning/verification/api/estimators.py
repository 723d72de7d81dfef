"""The two black-box estimators: how probes are chosen and what their responses say about each bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.signature import project
from gradsigns_lightning.verification.api.boundary import BoundaryImages
from gradsigns_lightning.verification.api.probes import Align, carrier_directions, moved, permutation, same
from gradsigns_lightning.verification.api.queries import QueryBudget
from gradsigns_lightning.verification.api.responses import Values

FIRST_STEP, _LARGEST_STEP = 4, 64  # grey levels
_SECOND_STEP = 8
_IMAGES_PER_STEP, _IMAGES_PER_LABEL_STEP = 2, 1
_COORDINATE_STEP = 32
_ROWS_PER_IMAGE = 128  # more would all share one image's own deviation from the class
_CALIBRATION, _BATCH = 8, 24  # probes before the step is adapted, and in each batch afterwards
_LEAST_SPREAD = 0.02  # in log-odds
_LEAST_SIGNAL_TO_NOISE = 3.0
_LABEL_SPREAD = 0.35  # of zeros and ones; with less, a few deviating labels would count for too much


@dataclass
class _ProbeSet:
    """Probes around one image, and the responses to those that have been queried."""

    image: Tensor
    side: int
    noise: float
    indices: npt.NDArray[np.int64]
    responses: Values = field(default_factory=lambda: np.empty(0))

    @property
    def complete(self) -> bool:
        """Whether every probe has been queried."""
        return len(self.responses) == len(self.indices)


class RowEstimator:
    """Estimates bits from probes along the rows of the projection, all on one side of an image.

    A bit takes one query: the mean over the image's probes replaces the query on the other side. The side
    alternates from image to image, so that curvature along a row cancels. When all images are used, each is
    probed once more on the other side.

    Args:
        budget: queries the model.
        boundary: images to probe around.
        directions: rows or groups as images, ``(n, C, H, W)``, with values of about 1.
        align: brings directions into the server's geometry.
    """

    def __init__(
        self, budget: QueryBudget, boundary: BoundaryImages, directions: Tensor, align: Align = same
    ) -> None:
        self.step = FIRST_STEP
        self.n_probes = self.n_images = 0
        self._budget, self._boundary, self._directions, self._align = budget, boundary, directions, align
        self._order = permutation(len(directions), "rows")
        self._next_row = 0
        self._sum: Values = np.zeros(len(directions))
        self._probe_set: _ProbeSet | None = None
        self._deviation: float | None = None
        self._limit = np.inf
        self._n_flat = 0

    def advance(self) -> bool:
        """Query one batch; return False when no image is left."""
        if self._probe_set is None or self._probe_set.complete:
            self._sum = self.scores()
            self._probe_set = self._next_image()
            if self._probe_set is None:
                return False
        probe_set = self._probe_set
        n_queried = len(probe_set.responses)
        batch = probe_set.indices[n_queried : n_queried + (_BATCH if n_queried else _CALIBRATION)]
        probes = moved(probe_set.image, self._align(self._directions[batch]), probe_set.side * self.step)
        probe_set.responses = np.append(probe_set.responses, self._budget.query(probes))
        self.n_probes += len(batch)
        if not n_queried:
            self._adapt_step(probe_set)
        return True

    def scores(self) -> Values:
        """Return each bit's score, shape ``(n,)``: positive for a 1, 0 where there is no evidence."""
        scores: Values = self._sum.copy()
        current = self._probe_set
        if current is not None:
            scores[current.indices[: len(current.responses)]] += self._contribution(current)
        return scores

    def _next_image(self) -> _ProbeSet | None:
        index, side = self.n_images, 1
        found = self._boundary.get(index)
        if found is None:
            index, side = index - self._boundary.size, -1
            found = self._boundary.get(index)
        if found is None:
            return None
        side = side if index % 2 == 0 else -side
        per_step = _IMAGES_PER_LABEL_STEP if self._budget.parser.kind == "labels" else _IMAGES_PER_STEP
        if self.n_images and self.n_images % per_step == 0:
            self.step = self.step * 2 if self.step < _LARGEST_STEP else _SECOND_STEP
        self.n_images += 1
        n_rows = len(self._order)
        rows = self._order[np.arange(self._next_row, self._next_row + min(n_rows, _ROWS_PER_IMAGE)) % n_rows]
        self._next_row += len(rows)
        return _ProbeSet(found.image, side, self._noise(found.image, found.log_odds), rows)

    def _noise(self, image: Tensor, log_odds: float) -> float:
        """Return the standard deviation of log-odds that rounding and the server's randomness cause."""
        if self._budget.parser.kind == "labels" or not np.isfinite(log_odds):
            return 0.0
        if self._deviation is None:
            repeats = [log_odds, *self._budget.query(image[None])]
            if repeats[1] != log_odds:
                repeats += [*self._budget.query(image.expand(2, *image.shape))]
            # Of the probability, because the same noise moves log-odds more where the model is confident.
            self._deviation = _deviation(np.tanh(np.array(repeats) / 2) / 2)
            self._limit = -np.log(max(self._deviation, 1e-7))
        log_odds = float(np.clip(log_odds, -self._limit, self._limit))
        per_probability = 2 + np.exp(log_odds) + np.exp(-log_odds)
        return float(
            np.hypot(self._deviation, self._budget.parser.resolution / np.sqrt(12)) * per_probability
        )

    def _adapt_step(self, probe_set: _ProbeSet) -> None:
        """Take a longer step if the responses hardly differ; drop the image if they do not differ at all."""
        spread = _deviation(probe_set.responses)
        only_labels = self._budget.parser.kind == "labels"
        least = 1e-9 if only_labels else max(_LEAST_SPREAD, _LEAST_SIGNAL_TO_NOISE * probe_set.noise)
        if spread >= least:
            self._n_flat = 0
            return
        self._n_flat += 1
        if self.step < _LARGEST_STEP and (not only_labels or self._n_flat > 1):
            self.step *= 2
            probe_set.responses = np.empty(0)
            self._n_flat = 0
        elif spread == 0:
            self._probe_set = None

    def _contribution(self, probe_set: _ProbeSet) -> Values:
        """Return each probe's score in units of the image's spread, less the share that noise explains."""
        responses = np.clip(probe_set.responses, -self._limit, self._limit)
        spread = _deviation(responses)
        if spread == 0:
            return np.zeros(len(responses))
        if self._budget.parser.kind == "labels":
            spread = max(spread, _LABEL_SPREAD)
        share = max(0.0, 1 - (probe_set.noise / spread) ** 2)
        scores: Values = np.nan_to_num(-probe_set.side * share * (responses - np.nanmean(responses)) / spread)
        return scores


class CoordinateEstimator:
    """Projects central differences along every carrier, as published (GradSigns, MLSys 2021, section 4).

    It takes ``2 * n_carriers`` queries per image.

    Args:
        budget: queries the model.
        boundary: images to probe around.
        key: the key whose carriers and projection are read.
        align: brings directions into the server's geometry.
    """

    step = _COORDINATE_STEP

    def __init__(
        self, budget: QueryBudget, boundary: BoundaryImages, key: SignatureKey, align: Align = same
    ) -> None:
        self.n_probes = self.n_images = 0
        self._budget, self._boundary, self._key, self._align = budget, boundary, key, align
        self._gradient: Values = np.zeros(len(key.carriers))
        self._image: Tensor | None = None
        self._next = 0

    def advance(self) -> bool:
        """Query one batch; return False when no image is left."""
        if self._image is None or self._next == len(self._gradient):
            found = self._boundary.get(self.n_images)
            if found is None:
                return False
            self._image, self._next = found.image, 0
            self.n_images += 1
        batch = slice(self._next, self._next + _BATCH // 2)
        directions = self._align(carrier_directions(self._key, batch))
        plus, minus = (moved(self._image, directions, side * self.step) for side in (1, -1))
        responses = self._budget.query(torch.stack([plus, minus], 1).flatten(0, 1)).reshape(-1, 2)
        self._gradient[batch] += np.nan_to_num(responses[:, 1] - responses[:, 0])
        self._next += len(directions)
        self.n_probes += 2 * len(directions)
        return True

    def scores(self) -> Values:
        """Return each bit's score, shape ``(n,)``: positive for a 1, 0 where there is no evidence."""
        return project(self._key.projection, torch.from_numpy(self._gradient)).numpy()


def _deviation(values: Values) -> float:
    return float(np.nanstd(values)) if np.isfinite(values).any() else 0.0
