"""The usual forms of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_IMAGES = ("x", "image", "images", "pixel_values", "input_ids")
_LABELS = ("y", "label", "labels", "target", "targets")


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a pair, or of a mapping with one entry of the usual names for each.

    Raises:
        TypeError: a batch of another form.
    """
    found: list[Any] = []
    if isinstance(batch, Mapping):
        images, labels = ([batch[name] for name in names if name in batch] for names in (_IMAGES, _LABELS))
        found = [*images, *labels] if len(images) == len(labels) == 1 else []
    elif isinstance(batch, (tuple, list)):
        found = list(batch)
    if len(found) == 2 and all(isinstance(value, Tensor) for value in found):
        return found[0], found[1]
    raise TypeError(
        f"`batch` must be two tensors (images, labels) or a mapping with one of each, got {_describe(batch)}. "
        "Override `GradSigns.images_and_labels` for batches of another form."
    )


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{size}"
