"""Watermarking schemes under one interface, so that one table has them all."""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.benchmark.schemes.base import Owner, Scheme
    from gradsigns_lightning.benchmark.schemes.gradsigns import GradSignsScheme, Unmarked

__all__ = ["GradSignsScheme", "Owner", "Scheme", "Unmarked"]

__getattr__, __dir__ = lazy_names(__name__, {"base": "Owner Scheme", "gradsigns": "GradSignsScheme Unmarked"})
