"""Packages whose names are imported when they are first asked for (PEP 562).

Importing torch takes a second and Lightning several, which neither ``gradsigns --version`` nor making a key shall wait for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        names: for each module of the package the names that come from it, with blanks between.
        modules: modules of the package that can be reached as attributes before anybody imported them.
    """
    module_of = {name: module for module, members in names.items() for name in members.split()}

    def getattribute(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *modules})

    return getattribute, directory


@contextmanager
def in_pythons_folder() -> Iterator[None]:
    """Make Python's own folder the current one, for imports: the folder of a command may be a received one.

    Numba, for one, reads `.numba_config.yaml` of the current folder, which names a folder of pickles; matplotlib reads
    `matplotlibrc`, and the loader of shared libraries looks there as well where a library says so.
    """
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
