"""Functional mirror of the metric classes."""

from gradsigns_lightning.metrics.functional.watermark import (
    bit_error_rate,
    bits_of,
    ownership_p_value,
    smallest_margin,
)

__all__ = ["bit_error_rate", "bits_of", "ownership_p_value", "smallest_margin"]
