"""Builds objects from the user's own configuration; the only caller of Hydra's ``instantiate``.

Received files do not come here: what a checkpoint may describe is in
:mod:`gradsigns_lightning.models.catalogue`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pkgutil import resolve_name
from typing import Any

from gradsigns_lightning.core.utils.files import USER_ERRORS, error_like
from gradsigns_lightning.lazy import in_pythons_folder
from gradsigns_lightning.runs.options import argument_names, spoken

ALLOWED_PACKAGES = ("gradsigns_lightning", "torchvision", "lightning", "torch")


def build(
    config: Any,
    /,
    *,
    option: str = "",
    names: Mapping[str, str] | None = None,
    own_code: bool = False,
    **arguments: Any,
) -> Any:
    """Return what ``config`` describes by its ``_target_`` and arguments.

    Args:
        config: a configuration node or plain containers.
        option: its name on the command line, which errors then use.
        names: names of arguments on the command line that are not ``option.argument``.
        own_code: whether a target may be any code of the user's own, as in a training; otherwise it must be
            one of this package, torch, lightning or torchvision.
        arguments: further arguments of the target.

    Raises:
        ValueError: there is no target, or one that is not allowed.
        TypeError, ImportError: what the target's constructor raises.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    plain = to_plain(config)
    for target in _iterate_targets(plain):
        find_target(target, own_code=own_code)
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise ValueError(f"`_target_` must name what to build, got {plain!r} without one.")
    try:
        with ExitStack() as scopes:
            # Hydra 1.4 requires such a scope, under a name that changed between its pre-releases.
            scope = getattr(hydra.utils, "execution_whitelist", None) or getattr(
                hydra.utils, "target_whitelist", None
            )
            for package in _packages(plain, own_code=own_code) if scope else ():
                scopes.enter_context(scope(f"{package}.*"))  # type: ignore[misc]
            return hydra.utils.instantiate(plain, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, InstantiationException):
            raise
        if isinstance(cause, ImportError) or (_is_own(plain) and type(cause) not in USER_ERRORS):
            raise cause from error
        kind = TypeError if isinstance(cause, TypeError) else error_like(cause)
        raise kind(_explained(str(cause), plain, option, names or {})) from error


def is_target(config: Any, kind: type) -> bool:
    """Tell whether ``config`` describes a ``kind``, under any of its names.

    Raises:
        ValueError: a target is not allowed, or does not exist.
    """
    import hydra.utils

    plain = to_plain(config)
    for target in _iterate_targets(plain):
        find_target(target)
    try:
        with in_pythons_folder():
            found = hydra.utils.get_object(plain["_target_"])
    except Exception:  # no target, or one whose module raises; `build` reports it
        return False
    return isinstance(found, type) and issubclass(found, kind)


def _explained(message: str, config: dict[str, Any], option: str, names: Mapping[str, str]) -> str:
    """Return an error's message with the arguments under their names on the command line.

    A message from outside this package also names the part of the configuration that raised it.
    """
    if not _is_own(config):
        return (
            f"`{option}`: {message} ({config['_target_']})" if option else f"{config['_target_']}: {message}"
        )
    if not option:
        return message
    return spoken(message, {**argument_names(config, option), "path": option, **names})


def _is_own(config: dict[str, Any]) -> bool:
    return str(config["_target_"]).startswith("gradsigns_lightning.")


def to_plain(config: Any) -> Any:
    """Return a configuration as plain containers with all references resolved.

    Raises:
        ValueError: a mandatory value is missing.
    """
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(config):
        return config
    check_given(config)
    return OmegaConf.to_container(config, resolve=True)


def check_given(config: Any) -> None:
    """Raise a :class:`MissingValueError` if a mandatory value of a configuration is missing."""
    missing = list(_missing_keys(config, config._get_full_key(None)))
    if missing:
        raise MissingValueError(missing)


def _missing_keys(config: Any, prefix: str) -> Iterator[str]:
    # OmegaConf's own function stops at the first reference to a missing value.
    from omegaconf import DictConfig

    for name in config:
        node, key = config._get_node(name), f"{prefix}.{name}" if prefix else str(name)
        if node._is_missing():
            yield key
        elif isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation()):
            yield from _missing_keys(node, key)


class MissingValueError(ValueError):
    """Mandatory values were not given."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(f"{', '.join(keys)} must be given")
        self.keys = keys


def find_target(target: Any, *, own_code: bool = False) -> Any:
    """Return what a ``_target_`` names.

    Args:
        target: its dotted name.
        own_code: as in :func:`build`.

    Raises:
        ValueError: it is not allowed, or nothing has that name.
    """
    if not isinstance(target, str) or not _is_allowed(target, own_code=own_code):
        raise _not_allowed(target, own_code=own_code)
    from hydra.utils import get_object

    with in_pythons_folder():  # which imports it
        _check_is_there(target, own_code=own_code)
        found = get_object(target)
    # A path may leave its package through a module's imports, as in `torch.os.system`.
    if not _is_allowed(str(getattr(found, "__module__", "")), own_code=own_code):
        raise _not_allowed(target, own_code=own_code)
    return found


def _is_allowed(name: str, *, own_code: bool) -> bool:
    package = name.partition(".")[0]
    return package in ALLOWED_PACKAGES or (
        own_code and package.isidentifier() and package not in sys.stdlib_module_names
    )


def _not_allowed(target: Any, *, own_code: bool) -> ValueError:
    allowed = ", ".join(f"{package}.*" for package in ALLOWED_PACKAGES)
    further = ", or code of your own that is not of Python's standard library" if own_code else ""
    return ValueError(f"`_target_` must be one of {allowed}{further}, got {target!r}.")


def _packages(config: Any, *, own_code: bool) -> set[str]:
    own = {target.partition(".")[0] for target in _iterate_targets(config)} if own_code else set()
    return {*ALLOWED_PACKAGES, *own}


def _check_is_there(target: str, *, own_code: bool) -> None:
    """Raise a ``ValueError`` that suggests a similar name if nothing is called ``target``.

    Hydra would print Python's errors.
    """
    try:
        resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        place, _, name = target.rpartition(".")
        try:
            close = difflib.get_close_matches(name, dir(resolve_name(place)), n=1)
        except (ImportError, AttributeError, ValueError):
            close = []
        hint = f" Did you mean {place}.{close[0]}?" if close else ""
        if own_code and not close and target.partition(".")[0] not in ALLOWED_PACKAGES:
            hint = f" {error}. code=FOLDER names the folder of your own modules, code=. the current folder."
        raise ValueError(
            f"`_target_` must name a class or function, got {target!r}, which is not there.{hint}"
        ) from error


def _iterate_targets(config: Any) -> Iterator[Any]:
    """Yield every ``_target_`` in plain containers."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _iterate_targets(value)
