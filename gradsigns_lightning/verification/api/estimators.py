"""The two black-box estimators: how probes are chosen and what their answers say about each bit."""

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
_CALIBRATION, _BATCH = 8, 24  # probes asked before the step is judged, and at once afterwards
_LEAST_SPREAD = 0.02  # in log-odds
_LEAST_SIGNAL_TO_NOISE = 3.0
_LABEL_SPREAD = 0.35  # of zeros and ones; below, a few odd labels would count for too much


@dataclass
class _Around:
    """Probes around one image, and how sure of T the model was there."""

    image: Tensor
    side: int
    noise: float
    indices: npt.NDArray[np.int64]
    answers: Values = field(default_factory=lambda: np.empty(0))

    @property
    def complete(self) -> bool:
        """Whether every probe has been asked."""
        return len(self.answers) == len(self.indices)


class RowEstimator:
    """Probes along the rows of the projection, all on one side of an image and compared with each other.

    One query a bit: the mean over the image's probes stands for the query on the other side. The side
    alternates from image to image, so that curvature along a row cancels. When all images are used, each is
    probed once more on the other side.

    Args:
        budget: asks the model.
        boundary: images to probe around.
        directions: rows or groups as images, ``(n, C, H, W)``, about 1 in size.
        align: brings some of them into the server's geometry.
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
        self._around: _Around | None = None
        self._deviation: float | None = None
        self._limit = np.inf
        self._n_flat = 0

    def advance(self) -> bool:
        """Ask one batch; return False when no image is left."""
        if self._around is None or self._around.complete:
            self._sum = self.scores()
            self._around = self._next_image()
            if self._around is None:
                return False
        around = self._around
        asked = len(around.answers)
        batch = around.indices[asked : asked + (_BATCH if asked else _CALIBRATION)]
        probes = moved(around.image, self._align(self._directions[batch]), around.side * self.step)
        around.answers = np.append(around.answers, self._budget.query(probes))
        self.n_probes += len(batch)
        if not asked:
            self._judge(around)
        return True

    def scores(self) -> Values:
        """Return the evidence for each bit being 1, shape ``(n,)``; 0 where there is none."""
        evidence: Values = self._sum.copy()
        if self._around is not None:
            evidence[self._around.indices[: len(self._around.answers)]] += self._contribution(self._around)
        return evidence

    def _next_image(self) -> _Around | None:
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
        return _Around(found.image, side, self._noise(found.image, found.log_odds), rows)

    def _noise(self, image: Tensor, log_odds: float) -> float:
        """Return the standard deviation of an answer's log-odds from rounding and from the server's randomness."""
        if self._budget.parser.kind == "labels" or not np.isfinite(log_odds):
            return 0.0
        if self._deviation is None:
            repeats = [log_odds, *self._budget.query(image[None])]
            if repeats[1] != log_odds:
                repeats += [*self._budget.query(image.expand(2, *image.shape))]
            # Of the probability, because the same noise moves log-odds the more the surer the model is.
            self._deviation = _deviation(np.tanh(np.array(repeats) / 2) / 2)
            self._limit = -np.log(max(self._deviation, 1e-7))
        log_odds = float(np.clip(log_odds, -self._limit, self._limit))
        per_probability = 2 + np.exp(log_odds) + np.exp(-log_odds)
        return float(
            np.hypot(self._deviation, self._budget.parser.resolution / np.sqrt(12)) * per_probability
        )

    def _judge(self, around: _Around) -> None:
        """Take a longer step if the answers hardly differ; leave images around which they do not differ at all."""
        spread = _deviation(around.answers)
        only_labels = self._budget.parser.kind == "labels"
        least = 1e-9 if only_labels else max(_LEAST_SPREAD, _LEAST_SIGNAL_TO_NOISE * around.noise)
        if spread >= least:
            self._n_flat = 0
            return
        self._n_flat += 1
        if self.step < _LARGEST_STEP and (not only_labels or self._n_flat > 1):
            self.step *= 2
            around.answers = np.empty(0)
            self._n_flat = 0
        elif spread == 0:
            self._around = None

    def _contribution(self, around: _Around) -> Values:
        """Return each probe's evidence in units of the image's spread, less where noise explains a share of it."""
        answers = np.clip(around.answers, -self._limit, self._limit)
        spread = _deviation(answers)
        if spread == 0:
            return np.zeros(len(answers))
        if self._budget.parser.kind == "labels":
            spread = max(spread, _LABEL_SPREAD)
        share = max(0.0, 1 - (around.noise / spread) ** 2)
        evidence: Values = np.nan_to_num(-around.side * share * (answers - np.nanmean(answers)) / spread)
        return evidence


class CoordinateEstimator:
    """The published estimator: central differences along every carrier, then the projection (GradSigns, MLSys 2021, section 4).

    It takes ``2 * n_carriers`` queries an image.

    Args:
        budget: asks the model.
        boundary: images to probe around.
        key: whose carriers and projection are read.
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
        """Ask one batch; return False when no image is left."""
        if self._image is None or self._next == len(self._gradient):
            found = self._boundary.get(self.n_images)
            if found is None:
                return False
            self._image, self._next = found.image, 0
            self.n_images += 1
        batch = slice(self._next, self._next + _BATCH // 2)
        directions = self._align(carrier_directions(self._key, batch))
        plus, minus = (moved(self._image, directions, side * self.step) for side in (1, -1))
        answers = self._budget.query(torch.stack([plus, minus], 1).flatten(0, 1)).reshape(-1, 2)
        self._gradient[batch] += np.nan_to_num(answers[:, 1] - answers[:, 0])
        self._next += len(directions)
        self.n_probes += 2 * len(directions)
        return True

    def scores(self) -> Values:
        """Return the evidence for each bit being 1, shape ``(n,)``; 0 where there is none."""
        return project(self._key.projection, torch.from_numpy(self._gradient)).numpy()


def _deviation(values: Values) -> float:
    return float(np.nanstd(values)) if np.isfinite(values).any() else 0.0
