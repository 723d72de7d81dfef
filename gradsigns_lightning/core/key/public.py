"""The public parameters of a key: their names, their JSON form, and those that the derivation is bound to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradsigns_lightning.core.utils.canonical import canonical_json

_CARRIED = ("owner", "scope", "n_bits", "n_carriers", "input_shape", "target_class")
_NORMALIZATION = ("input_mean", "input_std")
_BOUND = {1: _CARRIED, 2: (*_CARRIED, *_NORMALIZATION)}
_NAMES = {1: {*_CARRIED, *_NORMALIZATION}, 2: {*_CARRIED, *_NORMALIZATION, "version", "purpose"}}
VERSIONS = tuple(_NAMES)


def as_json(key: object, version: int) -> dict[str, Any]:
    """Return the public parameters among a key's attributes as plain JSON types."""
    public = {name: getattr(key, name) for name in _NAMES[version]}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in sorted(public.items())
    }


def context_of(public: Mapping[str, Any], version: int) -> bytes:
    """Return the canonical bytes of the parameters that all parts of a key are bound to."""
    return canonical_json({name: public[name] for name in _BOUND[version]})


def arguments_of(public: Mapping[str, Any]) -> dict[str, Any]:
    """Return a key's arguments from what :func:`as_json` returned.

    Raises:
        ValueError: a parameter is missing or unknown.
        TypeError: a shape or a normalization is not a sequence.
    """
    version = public.get("version", 1)
    names = _NAMES.get(version) if isinstance(version, int) else None
    if names is None:
        raise ValueError(f"`version` of a key must be one of {sorted(_NAMES)}, got {repr(version)[:80]}.")
    if set(public) != names:
        raise ValueError(
            f"`public` must have the members {sorted(names)}, got {str(sorted(map(repr, public)))[:400]}."
        )
    sequences = {name: tuple(public[name]) for name in ("input_shape", *_NORMALIZATION)}
    return {**public, "version": version, **sequences}
