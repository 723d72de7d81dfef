"""A key that is given itself or as its file."""

from __future__ import annotations

from os import PathLike

from gradsigns_lightning.core.key.key import WatermarkKey
from gradsigns_lightning.core.utils.files import error_like


def key_of(key: WatermarkKey | str | PathLike[str], *, argument: str = "key") -> WatermarkKey:
    """Return a key that was given itself or as its file.

    Args:
        key: a key, or the path of a key file.
        argument: what it is called in error messages.

    Raises:
        FileNotFoundError: the file is missing; it is a :class:`ValueError` too.
        ValueError: the file is damaged or no key file.
        TypeError: it is neither a key nor a path.
    """
    if isinstance(key, WatermarkKey):
        return key
    if not isinstance(key, (str, PathLike)):
        found = "None" if key is None else type(key).__name__  # no value, which may be a secret
        raise TypeError(
            f"`{argument}` must be a WatermarkKey or the path of a key file (.gskey), got {found}."
        )
    try:
        return WatermarkKey.load(key)
    except ValueError as error:
        raise error_like(error)(str(error).replace("`path`", f"`{argument}`", 1)) from error
