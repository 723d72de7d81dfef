"""Black-box reading: the signature from the answers of a prediction API."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.result import DEFAULT_ALPHA
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.verification.api.boundary import BoundaryImages
from gradsigns_lightning.verification.api.estimators import FIRST_STEP, RowEstimator
from gradsigns_lightning.verification.api.hypotheses import (
    Hypothesis,
    Stopped,
    make_hypotheses,
    read_hypotheses,
)
from gradsigns_lightning.verification.api.probes import directions_for, row_directions
from gradsigns_lightning.verification.api.queries import Journal, Oracle, QueryBudget, Transcript, normalized
from gradsigns_lightning.verification.api.responses import ResponseParser, Values
from gradsigns_lightning.verification.api.result import ApiVerificationResult
from gradsigns_lightning.verification.api.settings import ApiSettings, Estimator, Kind
from gradsigns_lightning.verification.foreign_modules import is_module, shapes_named
from gradsigns_lightning.verification.images import (
    check_key,
    check_raw_images,
    pixels_of,
    readable_key,
    warn_if_unlike,
)

_BATCH_SIZE = 32


def verify_api(
    predict: nn.Module | Oracle,
    key: SignatureKey | str | PathLike[str],
    images: Tensor,
    *,
    max_queries: int = 1000,
    alpha: float = DEFAULT_ALPHA,
    estimator: Estimator = "groups",
    answers: Kind | None = None,
    alignments: Sequence[str] = ("identity",),
    batch_size: int = _BATCH_SIZE,
    journal: str | PathLike[str] | None = None,
) -> ApiVerificationResult:
    """Read a key through a prediction API, without weights.

    Probes are 8-bit images ``x + h d`` around images near the decision boundary. How much lower the target
    class's log-odds are at a probe than at the image's other probes tells the sign of the loss's slope along
    d. The directions d are rows of the key's projection, or sums of a few of them (:func:`group_directions`).
    The published method (GradSigns, MLSys 2021, section 4) instead spends ``2 * n_carriers`` queries per
    image along single coordinates.

    Each next query depends on answers only, never on whether they agree with the signature, so the test is
    exact (except for one choice among several alignments, which the p-value pays for: :mod:`.hypotheses`). It
    is sequential, valid however it stops (:mod:`.sequential`), and ends when the evidence suffices or no
    longer can. Who reads again with other images until one reading succeeds multiplies the p-value by the
    number of readings.

    Args:
        predict: takes raw images ``(n, C, H, W)``, float32 in [0, 1] (multiples of 1/255), and returns scores
            ``(n, n_classes)``, NaN for classes that the API leaves out, or predicted classes ``(n,)``. A
            ``torch.nn.Module`` that returns logits gets its inputs normalized as the key says.
        key: the owner's key, or its file.
        images: natural images of the target class, raw in [0, 1], shape ``(n, C, H, W)``; rounded to 8 bits.
            50 or more.
        max_queries: most images that may be sent to the model.
        alpha: significance level of the verdict, above 0 and at most 1.
        estimator: ``"groups"`` folds the bits of long keys into about ``2 log2(1 / alpha)`` signs, which
            takes fewest queries; ``"rows"`` reads every bit by itself; ``"coordinate"`` is the published
            method.
        answers: ``"probabilities"``, ``"log_probabilities"``, ``"logits"`` or ``"labels"``; by default found
            from the first answers.
        alignments: what the server may do to images: ``"identity"``, ``"hflip"``, ``"shift(dy,dx)"`` in
            pixels. Each is tested, and the p-value corrected for their number. They take turns for half of
            the budget; then the best gets the rest.
        batch_size: most images in one call.
        journal: file to record the answers in. A reading that was interrupted continues from it and repeats
            no query.

    Raises:
        ValueError: an argument is out of range, or an answer is not what ``predict`` must return.
        TypeError: an argument has the wrong type.
    """
    settings = ApiSettings(
        estimator=estimator,
        answers=answers,
        alignments=alignments,  # type: ignore[arg-type]  # a list becomes a tuple
        batch_size=batch_size,
        max_queries=max_queries,
        alpha=alpha,
    )
    key = readable_key(key)
    check_key(key)
    check_raw_images(images, key)
    result, boundary = _verify(
        predict, key, pixels_of(images), settings, partial(Journal, journal) if journal is not None else None
    )
    warn_if_unlike([result], len(images), key.target_class, n_classified=boundary.n_classified, stacklevel=2)
    return result


def settings_of(lines: Sequence[Any]) -> ApiSettings:
    """Return the settings that a transcript's header states.

    Raises:
        ValueError: there is no such header.
    """
    names = {entry.name for entry in fields(ApiSettings)}
    header = lines[0] if isinstance(lines, Sequence) and lines else None
    # checked, not tried: an exception in `from_dict` other than its own would be a bug of ours
    if not isinstance(header, Mapping) or not names <= header.keys():
        raise ValueError(
            "`lines` must be the lines of a journal, of which the first says what was read and how."
        )
    return ApiSettings.from_dict({name: header[name] for name in names})


def replay(key: SignatureKey, pixels: Tensor, lines: Sequence[Any]) -> ApiVerificationResult:
    """Repeat a reading from its transcript, without any query.

    Args:
        key: the owner's key.
        pixels: the images of the reading, uint8, shape ``(n, C, H, W)``.
        lines: the lines of its journal (:func:`read_journal`).

    Raises:
        ValueError: the transcript is of another key or other images, or its queries are not those that such a
            reading makes.
    """

    def unanswered(_: Tensor) -> Any:
        raise ValueError("`lines`: the transcript ends before the reading does.")

    settings = settings_of(lines)
    opened: list[Transcript] = []

    def open_transcript(header: dict[str, Any]) -> Transcript:
        opened.append(Transcript(lines, header, name="the transcript"))
        return opened[0]

    result, _ = _verify(unanswered, key, pixels, settings, open_transcript)
    if opened[0].n_left:
        raise ValueError(
            f"`lines`: the transcript goes on for {opened[0].n_left} answers after the reading has ended."
        )
    return result


def _verify(
    predict: nn.Module | Oracle,
    key: SignatureKey,
    pixels: Tensor,
    settings: ApiSettings,
    open_transcript: Callable[[dict[str, Any]], Transcript] | None,
) -> tuple[ApiVerificationResult, BoundaryImages]:
    identity = {
        "commitment": key.commitment,
        "images": hashlib.sha256(
            repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()
        ).hexdigest(),
        **settings.to_dict(),
    }
    with open_transcript(identity) if open_transcript is not None else nullcontext() as transcript:
        budget = QueryBudget(
            _oracle(predict, key),
            ResponseParser(key.target_class, settings.answers),
            max_queries=settings.max_queries,
            batch_size=settings.batch_size,
            transcript=transcript,
        )
        directions, bits = directions_for(key, settings)
        boundary = BoundaryImages(pixels, budget, direction=directions[0], step=FIRST_STEP)
        hypotheses = make_hypotheses(key, budget, boundary, directions, bits, settings)
        stopped = read_hypotheses(hypotheses, budget, settings.alpha)
    best = min(hypotheses, key=lambda hypothesis: hypothesis.test.log10_p_value)
    return _result(best, key, budget, settings, stopped, boundary.recognised), boundary


def read_rows(
    predict: Oracle, key: SignatureKey, images: Tensor, *, max_queries: int
) -> tuple[Values, int, float, int]:
    """Spend a budget on reading the bits of a key, without comparing them with its signature.

    Args:
        predict: see :func:`verify_api`.
        key: the owner's key.
        images: see :func:`verify_api`.
        max_queries: most images that may be sent to the model.

    Returns:
        Each bit's score, shape ``(N,)``: positive if the bit was read as 1, 0 for an erasure; the number of
        queries; the share of natural images that the model classifies as the target class, and of how many.
    """
    check_key(key)
    check_raw_images(images, key)
    budget = QueryBudget(
        _oracle(predict, key),
        ResponseParser(key.target_class),
        max_queries=max_queries,
        batch_size=_BATCH_SIZE,
        transcript=None,
    )
    directions = row_directions(key)
    boundary = BoundaryImages(pixels_of(images), budget, direction=directions[0], step=FIRST_STEP)
    estimator = RowEstimator(budget, boundary, directions)
    while not budget.exhausted and estimator.advance():
        pass
    return estimator.scores(), budget.n_queries, boundary.recognised, boundary.n_classified


def _oracle(predict: Any, key: SignatureKey) -> Oracle:
    return _module_oracle(predict, key) if is_module(predict, argument="predict") else predict


def _module_oracle(model: nn.Module, key: SignatureKey) -> Oracle:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def logits(inputs: Tensor) -> Tensor:
        with torch.inference_mode(), frozen_statistics(model), shapes_named(key, model):
            output: Tensor = model(inputs.to(device=parameter.device, dtype=parameter.dtype))
        return output

    return normalized(logits, key)


def _result(
    hypothesis: Hypothesis,
    key: SignatureKey,
    budget: QueryBudget,
    settings: ApiSettings,
    stopped: Stopped,
    recognised: float,
) -> ApiVerificationResult:
    signed = hypothesis.signed()
    decided = signed[signed != 0]
    return ApiVerificationResult.of(
        signed,
        key,
        n_queries=budget.n_queries,
        alpha=settings.alpha,
        recognised=recognised,
        log10_p_value=hypothesis.test.log10_p_value,
        unit=float(np.sqrt(np.mean(decided**2))) if decided.size else 1.0,
        answers=budget.parser.kind,
        estimator=settings.estimator,
        alignment=hypothesis.name,
        step=hypothesis.estimator.step / 255,
        n_images=hypothesis.estimator.n_images,
        n_looks=hypothesis.test.n_looks,
        stopped=stopped,
    )
