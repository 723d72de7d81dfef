"""The usual forms of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_IMAGES = ("x", "image", "images", "pixel_values", "input_ids")
_LABELS = ("y", "label", "labels", "target", "targets")
_DEEPEST = 3  # levels of nesting that are searched


def images_and_labels(batch: Any, input_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a pair, or of a mapping with one entry of the usual names for each.

    Args:
        batch: the batch.
        input_shape: the key's; it lets an error message point out the images in a batch of another form.

    Raises:
        TypeError: the batch has another form.
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
        "`batch` must be two tensors (images, labels) or a mapping with one of each, got "
        f"{_describe(batch)}. Override `GradSigns.images_and_labels` for batches of another "
        f"form{_example(batch, input_shape)}"
    )


def cure(images: Tensor, labels: Tensor, input_shape: tuple[int, ...], *, any_input: bool) -> str:
    """Return the override of ``GradSigns.images_and_labels`` that fits a refused batch to the key.

    Returns "" if no override helps.

    Args:
        images: inputs of a batch.
        labels: labels of a batch.
        input_shape: the key's, ``(C, H, W)``.
        any_input: whether inputs may be anything, as with a carrier layer.
    """
    if not any_input and tuple(labels.shape[1:]) == input_shape and images.shape == labels.shape[:1]:
        return f" Do labels come first?{_override('y', 'x')}"
    if not any_input and (tuple(images.shape[1:]) != input_shape or not images.is_floating_point()):
        return _image_cure(images, input_shape)
    return _label_cure(labels, len(images)) if labels.shape != images.shape[:1] else ""


def _label_cure(labels: Tensor, n: int) -> str:
    if labels.ndim == 2 and labels.shape[0] == n:
        return (
            _override("x", "y.flatten()")
            if labels.shape[1] == 1
            else f" Are they one-hot?{_override('x', 'y.argmax(1)')}"
        )
    return " Override `GradSigns.images_and_labels` to return class indices."


def _image_cure(images: Tensor, input_shape: tuple[int, ...]) -> str:
    shape = tuple(images.shape[1:])
    x = (
        "x"
        if images.is_floating_point()
        else "(x.float() / 255)"
        if images.dtype == torch.uint8
        else "x.float()"
    )
    if shape == input_shape:
        advice = " Return the images that the network is trained on, normalized as the key says."
        return f"{advice}{_override(x, 'y')}"
    if len(shape) == 3 and shape == (*input_shape[1:], input_shape[0]):
        there, back = "permute(0, 3, 1, 2)", "permute(0, 2, 3, 1)"
    elif math.prod(shape) == math.prod(input_shape):
        there, back = (f"reshape(-1, {', '.join(map(str, s))})" for s in (input_shape, shape))
    else:
        key_shape = shape if len(shape) == 3 else (1, 1, math.prod(shape)) if len(shape) != 2 else (1, *shape)
        advice = f" Make a key with `input_shape={key_shape}`"
        if key_shape == shape:
            return (
                f"{advice}, or override `GradSigns.images_and_labels` if the network gets other images than "
                "the batch holds."
            )
        return (
            f"{advice}, and override `GradSigns.images_and_labels` to return images of that shape, and "
            "`GradSigns.logits`."
        )
    logits = f"def logits(self, pl_module, images): return pl_module(images.{back})"
    return f"{_override(f'{x}.{there}', 'y')}\n    {logits}"


def _override(images: str, labels: str) -> str:
    return (
        " Override `GradSigns.images_and_labels` in a subclass:\n"
        f"    def images_and_labels(self, batch): x, y = super().images_and_labels(batch); return {images}, "
        f"{labels}"
    )


def _example(batch: Any, input_shape: tuple[int, ...]) -> str:
    """Return an override that picks from a batch what looks like images and class indices.

    Returns the full stop of the sentence alone if nothing does.
    """
    tensors = list(_tensors_in(batch))
    images = [(path, t) for path, t in tensors if tuple(t.shape[1:]) == input_shape]
    labels = [
        (path, t)
        for path, t in tensors
        if t.ndim == 1 and not t.is_floating_point() and t.dtype != torch.bool
    ]
    pairs = [(x, y) for x, one in images for y, other in labels if len(one) == len(other)]
    if not pairs:
        return "."
    # Prefer pairs from the same part of the batch to those across parts, as with an unlabelled loader.
    x, y = min(pairs, key=lambda pair: pair[0][:-1] != pair[1][:-1])
    code = [f"batch{''.join(f'[{step!r}]' for step in path)}" for path in (x, y)]
    return f", for example:\n    def images_and_labels(self, batch): return {', '.join(code)}"


def _tensors_in(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(part, Tensor):
        yield path, part
    elif isinstance(part, (Mapping, tuple, list)) and len(path) < _DEEPEST:
        for step, value in part.items() if isinstance(part, Mapping) else enumerate(part):
            yield from _tensors_in(value, (*path, step))


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{size}"
