"""Public alias of :mod:`gradsigns_lightning.models.release_2021`, the authors' 2021 release."""

from gradsigns_lightning.models.release_2021 import load_2021

__all__ = ["load_2021"]
