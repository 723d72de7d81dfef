"""Imports of optional dependencies at the place of their use."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import and return a module of an optional dependency.

    Args:
        module: full name of the module, for example ``"torchvision.datasets"``.
        extra: extra of this package that installs it.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        import_module(package)  # on its own, because an already loaded submodule would be returned without it
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        command = f"pip install 'gradsigns-lightning[{extra}]'"
        raise ImportError(f"This needs {package}, which {problem}: {command}.", name=package) from error
