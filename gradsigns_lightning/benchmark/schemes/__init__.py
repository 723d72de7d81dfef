"""Watermarking schemes under one interface, so that one table has them all."""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.benchmark.schemes.adi import Adi
    from gradsigns_lightning.benchmark.schemes.base import Owner, Scheme
    from gradsigns_lightning.benchmark.schemes.eaaw import Eaaw
    from gradsigns_lightning.benchmark.schemes.gradsigns import GradSignsScheme, Unmarked
    from gradsigns_lightning.benchmark.schemes.uchida import Uchida

__all__ = ["Adi", "Eaaw", "GradSignsScheme", "Owner", "Scheme", "Uchida", "Unmarked"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adi": "Adi",
        "base": "Owner Scheme",
        "eaaw": "Eaaw",
        "gradsigns": "GradSignsScheme Unmarked",
        "uchida": "Uchida",
    },
)
