"""Key, objective, engines and watermarker: torch and cryptography only."""

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.objective import MarginObjective, PaperObjective
from gradsigns_lightning.core.schedule import Cadence, StrengthSchedule
from gradsigns_lightning.core.watermarker import Watermarker

__all__ = ["Cadence", "MarginObjective", "PaperObjective", "StrengthSchedule", "WatermarkKey", "Watermarker"]
