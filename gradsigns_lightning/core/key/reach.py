"""What a key can prove at best with its number of bits, and the warnings if that is too little."""

from __future__ import annotations

import math
import warnings

from gradsigns_lightning.core.statistics import ownership_p_value

USUAL_ALPHA = 1e-9  # default of all readers
USUAL_CUSTOMERS = 10_000  # default of `trace`
USUAL_GRINDING_BITS = 64.0  # default of `judge`
_ROOM = "128 leave room for wrong bits"


def least_bits(*, alpha: float = USUAL_ALPHA, tries: float = 0.0) -> int:
    """Return how many bits a key needs to be found `owned` if all of them are read right.

    Args:
        alpha: significance level, above 0 and at most 1.
        tries: base-2 logarithm of the number of tries that the p-value is multiplied by.

    Example:
        >>> least_bits(), least_bits(tries=64)
        (30, 94)
    """
    return max(0, math.ceil(tries - math.log2(alpha)))


def least_matches(n_bits: int, *, alpha: float = USUAL_ALPHA) -> int:
    """Return how many of ``n_bits`` must match for `owned`; all of them if even that is too few.

    Example:
        >>> least_matches(32), least_matches(128), least_matches(16)
        (32, 98, 16)
    """
    return next((n for n in range(n_bits // 2, n_bits) if ownership_p_value(n, n_bits) <= alpha), n_bits)


def log10_charged(log10_p_value: float, *, free_bits: float) -> float:
    """Return the base-10 logarithm of a p-value times ``2 ** free_bits``, at most 0; NaN bits charge nothing.

    Example:
        >>> log10_charged(-12.0, free_bits=8), log10_charged(-12.0, free_bits=128)
        (-9.591..., 0.0)
    """
    charged = log10_p_value + (0.0 if math.isnan(free_bits) else free_bits) * math.log10(2)
    return min(0.0, charged) if not math.isnan(charged) else math.nan


def for_whom(log10_p_value: float, *, free_bits: float, alpha: float) -> str:
    """Return for whom alone a model is `owned`, in words; empty if it still is after charging free bits."""
    if log10_charged(log10_p_value, free_bits=free_bits) <= math.log10(alpha):
        return ""
    return f", for the key's maker alone: {free_bits:g} bits of it could be fitted to this model"


def warn_if_never_owned(n_bits: int, *, stacklevel: int) -> None:
    """Warn of a new key that can never be ``owned`` at the default alpha; ``stacklevel`` is the caller's."""
    if n_bits < least_bits():
        warnings.warn(
            f"A key of {n_bits} bits can never be `owned` at the default alpha of {USUAL_ALPHA:g}, not even "
            f"if every bit is read right: {least_bits()} bits would do, {_ROOM}.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def what_is_out_of_reach(n_bits: int, *, free_bits: float, is_master: bool) -> str:
    """Return what judges and tracing can never find with a new key, and the bits they need; may be empty.

    Args:
        n_bits: bits of the key.
        free_bits: bits of choice that payload and purpose leave to the key's maker
            (:func:`.payload.free_bits`).
        is_master: whether customers' keys can be derived from it.
    """
    judged, traced = (
        least_bits(tries=USUAL_GRINDING_BITS + free_bits),
        least_bits(tries=math.log2(USUAL_CUSTOMERS)),
    )
    sentences = []
    if n_bits < judged:
        charged = f"2^{USUAL_GRINDING_BITS:g} keys tried" + (
            f" and {free_bits:g} bits of free choice" if free_bits else ""
        )
        sentences.append(
            f"No judge can find these {n_bits} bits `owned`: `judge` charges for {charged}, {judged} bits "
            "would do."
        )
    if is_master and n_bits < traced:
        sentences.append(
            f"No customer's copy can be traced by them: {traced} bits would do for {USUAL_CUSTOMERS} "
            "customers."
        )
    return " ".join(sentences)
