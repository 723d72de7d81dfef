"""Measures what an attack does: accuracy and mark, before, on the way and after."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradsigns_lightning.attacks.base import Attack, AttackData, device_of
from gradsigns_lightning.benchmark.records import AttackRecord, Point, Reading
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.result import DEFAULT_ALPHA, ReadingResult, decide, signed_by
from gradsigns_lightning.verification.api.queries import normalized
from gradsigns_lightning.verification.api.verify import verify_api
from gradsigns_lightning.verification.white_box import read_projections


class Reader(Protocol):
    """Reads a mark."""

    def read_weights(self, model: nn.Module) -> Reading:
        """Read the mark from a network that maps normalized inputs to logits."""

    def read_responses(self, model: nn.Module) -> Reading:
        """Read the mark from what a model answers to normalized inputs: logits, probabilities or labels."""


@dataclass(frozen=True)
class KeyReader:
    """Reads a key of this package.

    Attributes:
        key: the owner's key.
        images: raw images of the key's target class in [0, 1], ``(n, C, H, W)``, none of which the thief has.
        alpha: significance level of the verdict.
        max_queries: budget of a reading through responses.
    """

    key: WatermarkKey
    images: Tensor
    alpha: float = DEFAULT_ALPHA
    max_queries: int = 1000

    def read_weights(self, model: nn.Module) -> Reading:
        """Read the key from a model's weights."""
        z, recognised = read_projections(model, self.key, self.images)
        result = decide(z, self.key, n_queries=len(self.images), alpha=self.alpha, recognised=recognised)
        return _reading(result, weighted_agreement(signed_by(z.double().cpu(), self.key.signature)))

    def read_responses(self, model: nn.Module) -> Reading:
        """Read the key from what a model answers."""
        device = device_of(model)

        @torch.no_grad()
        def predict(inputs: Tensor) -> Tensor:
            answer: Tensor = model(inputs.to(device))
            return answer

        oracle = normalized(predict, self.key)
        result = verify_api(oracle, self.key, self.images, max_queries=self.max_queries, alpha=self.alpha)
        return _reading(result, math.nan)


@dataclass(frozen=True)
class Judge:
    """Measures a model's accuracy and reads the owner's mark from it.

    Attributes:
        reader: reads the mark.
        test: labelled test batches, normalized.
    """

    reader: Reader
    test: DataLoader[Any]

    def point(self, model: nn.Module, dose: float, *, kind: str = "model") -> Point:
        """Return what a model shows at a dose.

        Args:
            model: maps normalized inputs to logits, or to what an API answers.
            dose: of the attack.
            kind: ``"model"`` reads the weights, ``"responses"`` what the model answers.
        """
        read = self.reader.read_weights if kind == "model" else self.reader.read_responses
        device = device_of(model)
        # An attack that is watched must draw the same numbers as one that is not.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return Point(dose, self.accuracy(model), read(model))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of the test images that the model takes for their class."""
        device, n_right, n_seen = device_of(model), 0, 0
        for x, y in self.test:
            answer = model(x.to(device)).cpu()
            n_right += int(((answer.argmax(1) if answer.ndim == 2 else answer) == y).sum())
            n_seen += len(y)
        return n_right / n_seen


def best_device(accelerator: str = "auto") -> torch.device:
    """Return the GPU if there is one and ``accelerator``, as Lightning names it, does not say ``"cpu"``."""
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def weighted_agreement(signed: Tensor) -> float:
    """Return w of signed projections ``(2 b_j - 1) z_j``; NaN if all are zero or one is not finite."""
    length = float(signed.norm())
    return float(signed.sum()) / length if math.isfinite(length) and length > 0 else math.nan


def attacked(
    model: nn.Module, attack: Attack, data: AttackData, judge: Judge
) -> tuple[nn.Module, AttackRecord]:
    """Attack a model, and measure it before, on the way and after.

    Args:
        model: the stolen model, in evaluation mode.
        attack: the attack.
        data: what the thief has.
        judge: measures accuracy and mark.

    Returns:
        The attacked model, and what was measured.
    """
    before = judge.point(model, 0.0, kind=attack.kind)
    curve: list[Point] = []
    spent = 0.0

    def observe(dose: float, attacked: nn.Module) -> None:
        nonlocal spent
        begun = time.monotonic()
        curve.append(judge.point(attacked, dose, kind=attack.kind))
        spent += time.monotonic() - begun

    begun = time.monotonic()
    result = attack(model, data, observe=observe)
    seconds = time.monotonic() - begun - spent
    dose = curve[-1].dose if curve else 1.0
    settings = {entry.name: getattr(attack, entry.name) for entry in fields(attack)}  # type: ignore[arg-type]
    record = AttackRecord(
        type(attack).__name__,
        settings,
        attack.kind,
        before,
        judge.point(result, dose, kind=attack.kind),
        tuple(curve),
        seconds,
        data.n_images,
        asdict(data.recipe),
    )
    return result, record


def _reading(result: ReadingResult, w: float) -> Reading:
    return Reading(
        n_bits=result.n_bits,
        n_matches=result.n_matches,
        n_erasures=result.n_erasures,
        log10_p_value=result.log10_p_value,
        w=w,
        verdict=result.verdict,
        n_queries=result.n_queries,
    )
