"""Reading a suspect of any kind: a module from its weights, anything else through its answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.result import ReadingResult, readable
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.api.verify import read_rows, verify_api
from gradsigns_lightning.verification.foreign_modules import is_module
from gradsigns_lightning.verification.white_box import read_projections, verify


def read(
    suspect: nn.Module | Oracle,
    key: SignatureKey,
    images: Tensor,
    *,
    alpha: float,
    argument: str = "suspect",
    **api: Any,
) -> ReadingResult:
    """Read a key from a suspect; see :func:`verify` and :func:`verify_api`.

    Args:
        suspect: a module that returns logits, or an oracle that answers for one.
        key: the owner's key.
        images: raw natural images of the target class.
        alpha: significance level of the verdict.
        argument: what the suspect is called in error messages.
        api: settings of a reading through answers; see :func:`verify_api`.
    """
    if is_module(suspect, argument=argument):
        return verify(suspect, key, images, alpha=alpha)
    return verify_api(suspect, key, images, alpha=alpha, **api)


def read_scores(
    suspect: nn.Module | Oracle, key: SignatureKey, images: Tensor, *, max_queries: int
) -> tuple[npt.NDArray[np.float64], int, float, int]:
    """Read the bits of a key without comparing them with its signature; see :func:`read_rows`.

    Returns:
        Each bit's score, shape ``(N,)``: positive if the bit was read as 1, 0 for an erasure; the number of
        queries; the share of natural images that the model classifies as the target class, and of how many.
    """
    if not is_module(suspect, argument="suspect"):
        return read_rows(suspect, key, images, max_queries=max_queries)
    projections, recognised = read_projections(suspect, key, images)
    return readable(projections).numpy(), len(images), recognised, len(images)
