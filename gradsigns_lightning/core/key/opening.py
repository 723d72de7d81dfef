"""A key that is given itself or as its file."""

from __future__ import annotations

from os import PathLike

from gradsigns_lightning.core.key.key import WatermarkKey


class MissingKeyError(FileNotFoundError, ValueError):
    """There is no key file of that name."""


def key_of(key: WatermarkKey | str | PathLike[str], *, argument: str = "key") -> WatermarkKey:
    """Return a key that was given itself or as its file.

    Args:
        key: a key, or the path of a key file.
        argument: what it is called in error messages.

    Raises:
        ValueError: the file is missing (then it is a :class:`FileNotFoundError` too), damaged or no key file.
        TypeError: it is neither a key nor a path.
    """
    if isinstance(key, WatermarkKey):
        return key
    if not isinstance(key, (str, PathLike)):
        found = "None" if key is None else type(key).__name__  # no value, which may be a secret
        raise TypeError(f"`{argument}` must be a WatermarkKey or the path of a key file (.gskey), got {found}.")
    try:
        return WatermarkKey.load(key)
    except ValueError as error:
        kind = MissingKeyError if isinstance(error.__cause__, FileNotFoundError) else ValueError
        raise kind(str(error).replace("`path`", f"`{argument}`", 1)) from error
