"""Imports of the optional dependencies, with a message that says how to install them."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL_VISION = "pip install 'gradsigns-lightning[vision]'"


def import_torchvision(submodule: str) -> Any:
    """Return ``torchvision.<submodule>``.

    Raises:
        ImportError: torchvision is not installed.
    """
    return _import(f"torchvision.{submodule}")


def import_pillow() -> Any:
    """Return Pillow's ``PIL.Image`` module.

    Raises:
        ImportError: Pillow, which torchvision brings along, is not installed.
    """
    return _import("PIL.Image")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: `{INSTALL_VISION}`.") from error
