"""Readers of the signature and the result that they share."""

from gradsigns_lightning.extraction.black_box import ApiVerificationResult, verify_api
from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, VerificationResult
from gradsigns_lightning.extraction.white_box import verify, verify_many

__all__ = ["DEFAULT_ALPHA", "ApiVerificationResult", "VerificationResult", "verify", "verify_api", "verify_many"]
