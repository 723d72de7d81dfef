"""Key, objective, engines and watermarker, without any Trainer."""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.core.key import WatermarkKey
    from gradsigns_lightning.core.objective import MarginObjective, PaperObjective
    from gradsigns_lightning.core.schedule import Cadence, StrengthSchedule
    from gradsigns_lightning.core.settings import EmbeddingSettings
    from gradsigns_lightning.core.state import EmbeddingState
    from gradsigns_lightning.core.watermarker import Watermarker

__all__ = [
    "Cadence",
    "EmbeddingSettings",
    "EmbeddingState",
    "MarginObjective",
    "PaperObjective",
    "StrengthSchedule",
    "WatermarkKey",
    "Watermarker",
]

# Lazy, so that a misspelt word of a command line need not wait for torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "key": "WatermarkKey",
        "objective": "MarginObjective PaperObjective",
        "schedule": "Cadence StrengthSchedule",
        "settings": "EmbeddingSettings",
        "state": "EmbeddingState",
        "watermarker": "Watermarker",
    },
)
