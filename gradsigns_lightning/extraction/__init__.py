"""Readers of the signature and the result that they share."""

from gradsigns_lightning.extraction.black_box import ApiVerificationResult, verify_api
from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, VerificationResult
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
