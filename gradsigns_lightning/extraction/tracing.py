"""What a model carries besides the owner's claim: which customer's copy it is, or a short message."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gradsigns_lightning.core.checks import check_int
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.payload import CUSTOMER_BYTES, MAX_CUSTOMERS, customer_code, customer_key, message_code
from gradsigns_lightning.core.statistics import log10_sign_flip_p_value
from gradsigns_lightning.extraction.asking import Oracle
from gradsigns_lightning.extraction.black_box import read_rows
from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, Verdict, check_alpha, verdict_of, without_nan
from gradsigns_lightning.extraction.sequential import integer_scores
from gradsigns_lightning.extraction.white_box import read_projections

Evidence = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TraceResult:
    """Whose copy a model is.

    Attributes:
        customer: number of the customer whose signature fits best, 0 to ``n_customers - 1``.
        n_customers: customers that were compared.
        n_bits: bits of the key.
        n_matches: decided bits that equal this customer's signature.
        n_erasures: bits that the answers could not decide.
        next_n_matches: the same for the customer who fits next best.
        p_value: probability that a model without any of these signatures fits any customer as well, at most 1: the exact
            p-value of one customer times ``n_customers``; NaN when no bit was decided.
        log10_p_value: its base-10 logarithm.
        n_queries: images that the model was asked about.
        alpha: significance level of the verdict.
        verdict: ``"owned"`` if the copy is this customer's (p <= alpha), else ``"not_proven"`` or ``"inconclusive"``.
        commitment: public commitment of the customer's key.
    """

    customer: int
    n_customers: int
    n_bits: int
    n_matches: int
    n_erasures: int
    next_n_matches: int
    p_value: float
    log10_p_value: float
    n_queries: int
    alpha: float
    verdict: Verdict
    commitment: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; NaN becomes None."""
        return without_nan(vars(self))


@dataclass(frozen=True)
class Message:
    """A text that a model carries.

    Attributes:
        text: the text.
        n_corrected: wrong bits that were mended.
        n_correctable: wrong bits that could have been.
    """

    text: str
    n_corrected: int
    n_correctable: int


def trace(
    suspect: nn.Module | Oracle,
    master: WatermarkKey,
    images: Tensor,
    *,
    n_customers: int = 10_000,
    alpha: float = DEFAULT_ALPHA,
    max_queries: int = 1000,
) -> TraceResult:
    """Tell which customer's copy a model is, from one reading.

    The bits are read once and compared with every customer's signature (:func:`customer_key`); the nearest codeword is the
    maximum-likelihood answer, which mends more errors than the code guarantees. Copies averaged over several customers'
    (collusion) are not resolved.

    Args:
        suspect: a ``torch.nn.Module`` that returns logits, read from its weights, or what :func:`verify_api` can ask.
        master: the owner's key, without payload.
        images: raw natural images of the target class in [0, 1], shape ``(n, C, H, W)``; 50 or more.
        n_customers: customers numbered 0 to ``n_customers - 1``, at most 65536.
        alpha: significance level of the verdict.
        max_queries: images that may be asked about; all are used. Nothing to modules.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """
    check_int("n_customers", n_customers, minimum=2, maximum=MAX_CUSTOMERS)
    check_alpha(alpha)
    code = customer_code(master)
    evidence, n_queries = _read(suspect, master, images, max_queries)
    numbers = np.arange(n_customers, dtype="<u4").view(np.uint8).reshape(-1, 4)[:, :CUSTOMER_BYTES]
    payloads = np.unpackbits(code.encode_many(numbers), axis=1, bitorder="little")
    signatures = np.tile(master.signature.numpy(), (n_customers, 1))
    signatures[:, : payloads.shape[1]] ^= payloads
    signs = 2.0 * signatures - 1
    totals = signs @ evidence
    best, second = np.argsort(-totals, kind="stable")[:2]
    decided = evidence != 0
    n_matches, next_n_matches = (int((signs[i] * evidence > 0).sum()) for i in (best, second))
    log10_p_value = math.nan
    if decided.any():
        one = log10_sign_flip_p_value(integer_scores(signs[best] * evidence))
        log10_p_value = min(0.0, one + math.log10(n_customers))
    p_value = 10**log10_p_value
    return TraceResult(
        customer=int(best),
        n_customers=n_customers,
        n_bits=master.n_bits,
        n_matches=n_matches,
        n_erasures=int((~decided).sum()),
        next_n_matches=next_n_matches,
        p_value=p_value,
        log10_p_value=log10_p_value,
        n_queries=n_queries,
        alpha=alpha,
        verdict=verdict_of(p_value, alpha),
        commitment=customer_key(master, int(best)).commitment,
    )


def read_message(suspect: nn.Module | Oracle, master: WatermarkKey, images: Tensor, *, max_queries: int = 1000) -> Message:
    """Read the text that :func:`message_key` put into a model; arguments as for :func:`trace`.

    Raises:
        ValueError: more bits are wrong than the code mends, or an argument is out of range.
    """
    code = message_code(master)
    evidence, _ = _read(suspect, master, images, max_queries)
    data, n_corrected = code.decode((evidence > 0).astype(np.uint8) ^ master.signature.numpy())
    try:
        text = data.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise ValueError("`suspect` carries no message under this key: what was read is no text.") from error
    return Message(text=text, n_corrected=n_corrected, n_correctable=code.n_correctable)


def _read(suspect: nn.Module | Oracle, master: WatermarkKey, images: Tensor, max_queries: int) -> tuple[Evidence, int]:
    """Return the evidence for each bit being 1, shape ``(N,)``, and how many images were asked about."""
    if not isinstance(suspect, nn.Module):
        return read_rows(suspect, master, images, max_queries=max_queries)
    projections = read_projections(suspect, master, images)
    return np.sign(projections) if np.isfinite(projections).all() else np.zeros(master.n_bits), len(images)
