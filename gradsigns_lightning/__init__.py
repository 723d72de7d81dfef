"""Sign a classifier's input gradients while it trains, and prove later that the model is yours."""

from gradsigns_lightning.core import Cadence, MarginObjective, PaperObjective, StrengthSchedule, WatermarkKey
from gradsigns_lightning.extraction import ApiVerificationResult, VerificationResult, verify, verify_api, verify_many
from gradsigns_lightning.integration import GradSigns, GradSignsMixin

__version__ = "0.1.0"

__all__ = [
    "ApiVerificationResult",
    "Cadence",
    "GradSigns",
    "GradSignsMixin",
    "MarginObjective",
    "PaperObjective",
    "StrengthSchedule",
    "VerificationResult",
    "WatermarkKey",
    "verify",
    "verify_api",
    "verify_many",
]
