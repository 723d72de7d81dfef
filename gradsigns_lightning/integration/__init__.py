"""Adapters to Lightning; the only package that knows its hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.integration.callback import GradSigns
    from gradsigns_lightning.integration.fabric import FabricGradSigns
    from gradsigns_lightning.integration.mixin import GradSignsMixin

__all__ = ["FabricGradSigns", "GradSigns", "GradSignsMixin"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"callback": "GradSigns", "fabric": "FabricGradSigns", "mixin": "GradSignsMixin", "release": "strip"},
)
