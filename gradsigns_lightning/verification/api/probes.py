"""Probe images: exact 8-bit images, moved along the rows of a key's projection."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.verification.api.settings import ApiSettings, shift_of

# a proof at alpha needs at least log2(1 / alpha) signs that are all right
_LEAST_GROUPS, _GROUPS_PER_BIT = 16, 2.1
_WORTH_FOLDING = 1.5
_LARGEST_ROOM = 16
_MAX_VALUES = 1 << 28
_AT_ONCE = 32  # directions that any estimator has in memory
Align = Callable[[Tensor], Tensor]


def same(directions: Tensor) -> Tensor:
    """Return the directions unchanged, for a server that leaves images as they are."""
    return directions


_NAMED: dict[str, Align] = {"identity": same, "hflip": lambda image: image.flip(-1)}


def alignment(name: str) -> Align:
    """Return the function that undoes an alignment on directions ``(n, C, H, W)``.

    Args:
        name: ``"identity"``, ``"hflip"`` (the server flips left and right) or ``"shift(dy,dx)"`` (it moves
            images down by dy and to the right by dx pixels, -99 to 99).

    Raises:
        ValueError: there is no such alignment.
    """
    if name in _NAMED:
        return _NAMED[name]
    down, right = shift_of(name)
    return lambda image: torch.roll(image, (-down, -right), (-2, -1))


def row_directions(key: SignatureKey) -> Tensor:
    """Return each row of the projection as an image, zero off the carriers; ``(N, C, H, W)``, in [-1, 1]."""
    _check_size(max(key.n_bits, _AT_ONCE), key)
    return _as_images(key.projection.float(), key)


def directions_for(key: SignatureKey, settings: ApiSettings) -> tuple[Tensor, Tensor]:
    """Return the directions of a reading and each one's bit, as :func:`group_directions` does.

    The rows of long keys are folded where the settings say so.
    """
    n_groups = max(_LEAST_GROUPS, math.ceil(-_GROUPS_PER_BIT * math.log2(settings.alpha)))
    is_folded = settings.estimator == "groups" and key.n_bits > _WORTH_FOLDING * n_groups
    return group_directions(key, n_groups if is_folded else key.n_bits)


def group_directions(key: SignatureKey, n_groups: int) -> tuple[Tensor, Tensor]:
    """Fold the rows of the projection into groups, each with one sign.

    A group's direction is the sum of its rows, each with the sign that its bit has relative to the group's
    first bit, divided by the square root of their number. Given the relative signs the first bit is still
    uniform, so for a model not signed with the key the sign of the loss's slope along the direction agrees
    with it with probability 1/2; for a signed model the rows' slopes add up while what differs from image to
    image averages out.

    Args:
        key: the owner's key.
        n_groups: number of groups, 1 to N; with N each row is a group.

    Returns:
        Directions ``(n_groups, C, H, W)``, float32, and each group's first bit ``(n_groups,)``, uint8.
    """
    _check_size(max(n_groups, _AT_ONCE), key)
    # Replays depend on the label, which is older than the term "group".
    groups = np.array_split(permutation(key.n_bits, "blocks"), n_groups)
    signs = 2 * key.signature.float() - 1
    directions = [
        (signs[group] * signs[group[0]]) @ key.projection[group].float() / len(group) ** 0.5
        for group in map(torch.from_numpy, groups)
    ]
    return _as_images(torch.stack(directions), key), key.signature[[int(group[0]) for group in groups]]


def carrier_directions(key: SignatureKey, chosen: slice) -> Tensor:
    """Return each of the ``chosen`` carriers as an image of zeros with a one there; ``(n, C, H, W)``."""
    carriers = key.carriers[chosen]
    directions = torch.zeros(len(carriers), math.prod(key.input_shape))
    directions[torch.arange(len(carriers)), carriers] = 1
    return directions.view(-1, *key.input_shape)


def _as_images(rows: Tensor, key: SignatureKey) -> Tensor:
    """Spread values at the carriers, ``(n, c)``, over images ``(n, C, H, W)`` of zeros."""
    directions = torch.zeros(len(rows), math.prod(key.input_shape))
    directions[:, key.carriers] = rows
    return directions.view(-1, *key.input_shape)


def _check_size(n_directions: int, key: SignatureKey) -> None:
    """Refuse keys, which may be foreign, whose directions would take more than a gibibyte."""
    if n_directions * math.prod(key.input_shape) > _MAX_VALUES:
        raise ValueError(
            f"`key` must have at most {_MAX_VALUES} values in all directions to be read through an API, got "
            f"{n_directions} directions of shape {key.input_shape}; read it from the weights, or with "
            "estimator='groups'."
        )


def moved(image: Tensor, directions: Tensor, step: int) -> Tensor:
    """Move an 8-bit image by ``step`` grey levels along each direction; uint8.

    Pixels near black and white are first moved inwards, by 16 levels at most, so that they can move both ways
    like all others; otherwise the dark background of many images would not take part.
    """
    room = min(abs(step), _LARGEST_ROOM)
    return (
        (image.float().clamp(room, 255 - room) + torch.round(step * directions)).clamp(0, 255).to(torch.uint8)
    )


def blended(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return ``(1 - share) * first + share * second`` as an 8-bit image."""
    return ((1 - share) * first.float() + share * second.float()).round().to(torch.uint8)


def shuffled(image: Tensor) -> Tensor:
    """Return the image with its pixels permuted: the same colours, no object."""
    flat = image.flatten(1)
    return flat[:, torch.from_numpy(permutation(flat.shape[1], "pixels"))].view_as(image)


def permutation(size: int, label: str) -> npt.NDArray[np.int64]:
    """Return a fixed permutation of ``range(size)``."""
    # A judge replays it years later, so no library's random generator may make it.
    stream = hashlib.shake_256(f"gradsigns/v1/probes/{label}".encode()).digest(8 * size)
    return np.argsort(np.frombuffer(stream, dtype="<u8"), kind="stable")
