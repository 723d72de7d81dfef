"""Watermarkers that are given as objects, or as keys or key files with settings."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike

from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.settings import DEFAULTS, EmbeddingSettings
from gradsigns_lightning.core.watermarker import Watermarker


def watermarker_of(
    key: WatermarkKey | Watermarker | str | PathLike[str], settings: EmbeddingSettings
) -> Watermarker:
    """Return the given watermarker, or one for the given key or key file.

    Raises:
        ValueError: settings are given together with a watermarker, which has its own; or the key cannot be
            embedded with these settings.
    """
    if not isinstance(key, Watermarker):
        return Watermarker(key_of(key), settings)
    if given := [
        field.name
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(DEFAULTS, field.name)
    ]:
        raise ValueError(
            f"`{given[0]}` must not be given together with a `Watermarker`, which has settings of its own: "
            f"{key.settings}."
        )
    return key
