"""Readers of the signature and the result that they share."""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.core.result import DEFAULT_ALPHA, VerificationResult
    from gradsigns_lightning.extraction.black_box import ApiVerificationResult, verify_api
    from gradsigns_lightning.extraction.tracing import Message, TraceResult, read_message, trace
    from gradsigns_lightning.extraction.white_box import verify, verify_many

__all__ = [
    "DEFAULT_ALPHA",
    "ApiVerificationResult",
    "Message",
    "TraceResult",
    "VerificationResult",
    "read_message",
    "trace",
    "verify",
    "verify_api",
    "verify_many",
]

# Lazy, so that a commitment, which needs no tensors, need not wait for torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "black_box": "ApiVerificationResult verify_api",
        ".core.result": "DEFAULT_ALPHA VerificationResult",
        "tracing": "Message TraceResult read_message trace",
        "white_box": "verify verify_many",
    },
    modules=("evidence", "oracles"),
)
