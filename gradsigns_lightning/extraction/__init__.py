"""Readers of the signature and the result that they share."""

from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, VerificationResult
from gradsigns_lightning.extraction.white_box import verify, verify_many

__all__ = ["DEFAULT_ALPHA", "VerificationResult", "verify", "verify_many"]
