"""Adapters to Lightning; the only room that knows its hooks."""

from gradsigns_lightning.integration.callback import GradSigns
from gradsigns_lightning.integration.fabric import FabricGradSigns
from gradsigns_lightning.integration.mixin import GradSignsMixin

__all__ = ["FabricGradSigns", "GradSigns", "GradSignsMixin"]
