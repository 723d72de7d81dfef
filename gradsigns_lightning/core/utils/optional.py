"""Imports of the optional dependencies, where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Return a module of an optional dependency, imported now.

    Args:
        module: its full name, ``"torchvision.datasets"``.
        extra: the package's extra that brings it along.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        import_module(package)  # by itself: a part of it that is loaded already would be given without it
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        command = f"pip install 'gradsigns-lightning[{extra}]'"
        raise ImportError(f"This needs {package}, which {problem}: {command}.", name=package) from error
