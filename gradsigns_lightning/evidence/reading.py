"""A judge's readings: of the suspect, of the claimant's transcript by replay, and of control models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.core.result import ReadingResult
from gradsigns_lightning.evidence.bundle import Bundle
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.api.result import ApiVerificationResult
from gradsigns_lightning.verification.api.verify import replay, settings_of
from gradsigns_lightning.verification.images import FewImagesWarning
from gradsigns_lightning.verification.suspects import read

_CONTROL_ALPHA = 1e-3  # for all controls together


@dataclass(frozen=True)
class Readings:
    """A judge's readings, before their p-values are adjusted.

    Attributes:
        key: the opened key as it was read from the suspect, with the suspect's normalization.
        suspect: the judge's own reading, or None.
        transcript: the claimant's reading, replayed from the bundle, or None.
        as_announced: whether the transcript was read with the settings that the published commitment
            announced; true if there is no transcript.
        controls: the reading of each control model, at its share of the level for all controls.
    """

    key: KeyAsRead
    suspect: ReadingResult | None
    transcript: ApiVerificationResult | None
    as_announced: bool
    controls: Mapping[str, ReadingResult]

    @property
    def decisive(self) -> ReadingResult:
        """The reading that is judged: the judge's own, or the transcript if there is no suspect to read."""
        result = self.suspect or self.transcript
        assert result is not None
        return result


def read_all(
    bundle: Bundle,
    key: KeyAsRead,
    *,
    suspect: nn.Module | Oracle | None,
    controls: Mapping[str, nn.Module | Oracle],
    images: Tensor | None,
    alpha: float,
    max_queries: int,
) -> Readings:
    """Read the suspect, replay the transcript, and read the controls, as far as they are given.

    Args:
        bundle: the evidence.
        key: the bundle's key, with the suspect's normalization.
        suspect: the model in dispute, or None.
        controls: models that the claimant had no part in, under their names; they take raw images.
        images: the judge's own images; None if there is neither suspect nor control.
        alpha: significance level at which the suspect is read.
        max_queries: most images that may be sent to each suspect or control behind an API.

    Raises:
        ValueError: there is neither a suspect nor a transcript, or the transcript is not genuine.
    """
    own = None
    if suspect is not None and images is not None:
        own = read(suspect, key, images, alpha=alpha, max_queries=max_queries)
    transcript, as_announced = _replayed(bundle)
    if own is None and transcript is None:
        raise ValueError("`suspect` must be given: the bundle holds no transcript that could be replayed.")
    with _enough_images(own):
        others = _read_controls(controls, bundle.key, images, max_queries)
    return Readings(key, own, transcript, as_announced, others)


def _replayed(bundle: Bundle) -> tuple[ApiVerificationResult | None, bool]:
    """Return the transcript's result, and whether its reading was made as announced."""
    if bundle.images is None or bundle.transcript is None:
        return None, True
    result = replay(bundle.key, bundle.images, bundle.transcript)
    return result, settings_of(bundle.transcript) == bundle.statement.reading


@contextmanager
def _enough_images(reading: ReadingResult | None) -> Iterator[None]:
    """Silence the warning of few images for the controls if they sufficed to find the mark in the suspect."""
    with warnings.catch_warnings():
        if reading is not None and reading.verdict == "owned":
            warnings.simplefilter("ignore", FewImagesWarning)
        yield


def _read_controls(
    controls: Mapping[str, nn.Module | Oracle], key: WatermarkKey, images: Tensor | None, max_queries: int
) -> dict[str, ReadingResult]:
    if images is None or not controls:
        return {}
    raw = KeyAsRead.of(key, input_mean=0.0, input_std=1.0)
    alpha = _CONTROL_ALPHA / len(controls)
    return {
        name: read(model, raw, images, alpha=alpha, argument="controls", max_queries=max_queries)
        for name, model in controls.items()
    }
