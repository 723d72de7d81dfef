"""Reading signatures and messages from weights or through a prediction API (:mod:`.api`), and tracing copies.

Every verdict follows the rules of :mod:`gradsigns_lightning.core.result`. Nothing here trains, and nothing
judges a claim: what a third party may conclude from a reading is in :mod:`gradsigns_lightning.evidence`.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.verification.api.result import ApiVerificationResult
    from gradsigns_lightning.verification.api.verify import verify_api
    from gradsigns_lightning.verification.message import Message, read_message
    from gradsigns_lightning.verification.tracing import TraceResult, trace
    from gradsigns_lightning.verification.white_box import verify, verify_many

__all__ = [
    "ApiVerificationResult",
    "Message",
    "TraceResult",
    "read_message",
    "trace",
    "verify",
    "verify_api",
    "verify_many",
]

# Lazy, so that a commitment, which needs no tensors, does not wait for torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "api.result": "ApiVerificationResult",
        "api.verify": "verify_api",
        "message": "Message read_message",
        "tracing": "TraceResult trace",
        "white_box": "verify verify_many",
    },
)
