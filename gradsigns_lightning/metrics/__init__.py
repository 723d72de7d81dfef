"""Watermark metrics as torchmetrics classes; :mod:`.functional` mirrors them."""

from gradsigns_lightning.metrics.watermark import (
    BitErrorRate,
    MeanInputGradient,
    OwnershipPValue,
    SmallestMargin,
)

__all__ = ["BitErrorRate", "MeanInputGradient", "OwnershipPValue", "SmallestMargin"]
