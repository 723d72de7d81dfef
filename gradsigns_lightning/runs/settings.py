"""Converts a command line's values to settings of the package."""

from __future__ import annotations

from typing import Any

from gradsigns_lightning.runs.options import api_names, options
from gradsigns_lightning.verification.api.settings import ApiSettings


def reading_settings(settings: dict[str, Any]) -> ApiSettings:
    """Return how the command line queries a prediction API, or announces that it will.

    Raises:
        ValueError: a value is out of range.
    """
    api = {name: value for name, value in settings["api"].items() if name != "journal"}
    with options(api_names(settings)):
        return ApiSettings(**api, alpha=settings["alpha"])
