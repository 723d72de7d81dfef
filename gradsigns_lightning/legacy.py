"""The 2021 release under the name that callers know; it lives in :mod:`gradsigns_lightning.models.release_2021`."""

from gradsigns_lightning.models.release_2021 import load_2021

__all__ = ["load_2021"]
