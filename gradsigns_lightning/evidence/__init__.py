"""Evidence that a third party can check: commitment before release, claim, judgement.

This package holds the files and the verdicts on them; the readings that they rest on are made by
:mod:`gradsigns_lightning.verification`.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.evidence.adjusting import GRINDING_BITS
    from gradsigns_lightning.evidence.bundle import Bundle
    from gradsigns_lightning.evidence.commitment import Statement, load_signer, make_statement, signer_pem
    from gradsigns_lightning.evidence.judging import Judgement, judge
    from gradsigns_lightning.evidence.timestamp import check_timestamp, timestamp_request

__all__ = [
    "GRINDING_BITS",
    "Bundle",
    "Judgement",
    "Statement",
    "check_timestamp",
    "judge",
    "load_signer",
    "make_statement",
    "signer_pem",
    "timestamp_request",
]

# Lazy, so that a commitment, which needs no tensors, does not wait for torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adjusting": "GRINDING_BITS",
        "bundle": "Bundle",
        "commitment": "Statement load_signer make_statement signer_pem",
        "judging": "Judgement judge",
        "timestamp": "check_timestamp timestamp_request",
    },
)
