"""Packages whose names are imported when they are first used (PEP 562).

Importing torch takes a second and Lightning several; neither ``gradsigns --version`` nor making a key should
wait for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

_SAFE_PATH = "PYTHONSAFEPATH"


def lazy_names(
    package: str, names: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: name of the package.
        names: for each module of the package, the names that come from it, separated by blanks; a module
            whose name begins with a dot is one of the parent package.
        modules: modules of the package that are attributes of it even before they are imported.
    """
    module_of = {name: module for module, members in names.items() for name in members.split()}

    def getattribute(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{module_of[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *modules})

    return getattribute, directory


_command = False  # whether this process is the command line's own


@contextmanager
def as_command() -> Iterator[None]:
    """Mark this process as the command line's own, whose current folder may be a received one.

    The processes that it starts (``ddp_spawn``, a launcher) then import no modules from that folder (since
    Python 3.11).
    """
    global _command
    before, os.environ[_SAFE_PATH] = (_command, os.environ.get(_SAFE_PATH)), "1"
    _command = True
    try:
        yield
    finally:
        _command = before[0]
        if before[1] is None:
            os.environ.pop(_SAFE_PATH, None)
        else:
            os.environ[_SAFE_PATH] = before[1]


def is_command() -> bool:
    """Tell whether this process is the command line's own; see :func:`as_command`."""
    return _command


@contextmanager
def in_pythons_folder() -> Iterator[None]:
    """Make Python's own folder the current one during imports, if this process is a command.

    A command's current folder may be a received one. Numba, for example, reads `.numba_config.yaml` there,
    which names a folder of pickles; matplotlib reads `matplotlibrc`, and the loader of shared libraries looks
    there too if a library says so. In a library call this does nothing, because other threads of the caller's
    process may rely on its current folder.
    """
    if not _command:
        yield
        return
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the current folder was deleted
        yield
        return
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(here)
