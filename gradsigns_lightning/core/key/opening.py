"""Keys that are given as objects or as files."""

from __future__ import annotations

from os import PathLike

from gradsigns_lightning.core.key.key import WatermarkKey
from gradsigns_lightning.core.utils.files import error_like


def key_of(key: WatermarkKey | str | PathLike[str], *, argument: str = "key") -> WatermarkKey:
    """Return the given key, or load it from its file.

    Args:
        key: a key, or the path of a key file.
        argument: name of the argument in error messages.

    Raises:
        FileNotFoundError: the file is missing; the error is a :class:`ValueError` too.
        ValueError: the file is damaged or not a key file.
        TypeError: ``key`` is neither a key nor a path.
    """
    if isinstance(key, WatermarkKey):
        return key
    if not isinstance(key, (str, PathLike)):
        found = "None" if key is None else type(key).__name__  # not the value, which may be a secret
        raise TypeError(
            f"`{argument}` must be a WatermarkKey or the path of a key file (.gskey), got {found}."
        )
    try:
        return WatermarkKey.load(key)
    except ValueError as error:
        raise error_like(error)(str(error).replace("`path`", f"`{argument}`", 1)) from error
