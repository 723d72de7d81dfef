"""Checks that the step gives the network the images of its batch, not others that it normalized itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.checking import N_IMAGES

_TOLERANCE = 0.02  # relative to the spread; half precision rounds
_AUGMENTED = 0.5  # most that augmentation moves the mean, in spreads, or changes the spread


class InputWatch:
    """Compares what the logits hook gives the network's first layer with what the step gives it.

    Augmentation inside the step is accepted, because it keeps the range of the images.

    Args:
        module: the LightningModule; with None nothing is watched.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        module = nn.Module() if module is None else module
        # A hook would make a compiled network compile again.
        compiled = any(
            getattr(m, "_compiled_call_impl", None)
            or getattr(m, "_compiler_ctx", None)
            or type(m).__name__ == "OptimizedModule"
            for m in module.modules()
        )
        self._layers: list[nn.Module] = [] if compiled else [m for m in module.modules() if _is_layer(m)]
        self._first: nn.Module | None = None
        self._expected: Tensor | None = None
        self._handle: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record which layer is called first, and its input."""
        handles = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch_the_step(self) -> None:
        """Compare the layer's next input with the recorded one, and warn if they differ."""
        if self._first is not None and self._handle is None:
            self._handle = self._first.register_forward_pre_hook(self._compare)

    def stop(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._first = self._expected = None
        self._layers = []  # a copy of the callback must not copy the network

    def _note(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._first is None and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self._first, self._expected = layer, args[0].detach()[:N_IMAGES].float().clone()

    def _compare(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        expected = self._expected
        self.stop()
        if expected is None or not args or not isinstance(args[0], Tensor) or len(args[0]) < len(expected):
            return
        found = args[0].detach()[: len(expected)].float()
        difference = _difference(expected, found)
        if difference:
            warnings.warn(
                f"The step gives the network other images than the batch holds: {difference[0]}. The mark "
                "would be embedded on images that the network never gets, and read on others. Change the "
                "images in the data set instead, or override `GradSigns.images_and_labels` in a subclass to "
                "return them as the network gets them:\n"
                "    def images_and_labels(self, batch): x, y = super().images_and_labels(batch); return "
                f"{difference[1]}, y\n"
                "The key's `input_mean` and `input_std` must say how they are normalized.",
                UserWarning,
                stacklevel=2,
            )


def _is_layer(module: nn.Module) -> bool:
    special = isinstance(module, torch.jit.ScriptModule) or "parametrizations" in type(module).__module__
    return not special and next(module.children(), None) is None


def _difference(expected: Tensor, found: Tensor) -> tuple[str, str] | None:
    """Return in words and in code how the images differ; None if they are equal or merely augmented."""
    if expected.shape != found.shape:
        return (
            f"they have shape {tuple(found.shape[1:])}, not {tuple(expected.shape[1:])}",
            "self.as_the_step_does(x)",
        )
    mean, spread = expected.mean(), expected.std().clamp_min(1e-12)
    if bool((expected - found).abs().max() <= _TOLERANCE * spread):
        return None
    scale = _normalization(expected, found)
    if scale is not None:
        code = "(x - {}) / {}".format(*map(_in_code, scale))
        return f"they are {code}, where x are those of the batch", code
    moved = (found.mean() - mean).abs() > _AUGMENTED * spread
    ratio = found.std() / spread
    if bool(moved) or not _AUGMENTED <= float(ratio) <= 1 / _AUGMENTED:
        ends = [f"{float(end):.3g}" for tensor in (found, expected) for end in tensor.aminmax()]
        return "they range from {} to {}, the batch's from {} to {}".format(*ends), "self.as_the_step_does(x)"
    return None


def _normalization(expected: Tensor, found: Tensor) -> tuple[list[float], list[float]] | None:
    """Return the mean and std per channel that normalize ``expected`` to ``found``; None if none do."""
    channels = (
        (expected.transpose(0, 1), found.transpose(0, 1))
        if expected.ndim == 4
        else (expected[None], found[None])
    )
    x, y = (tensor.flatten(1) for tensor in channels)
    centred, moved = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    slope = (centred * moved).sum(1) / centred.square().sum(1).clamp_min(1e-12)
    rest = (moved - slope[:, None] * centred).norm(dim=1)
    if bool((rest > _TOLERANCE * moved.norm(dim=1).clamp_min(1e-12)).any()) or bool(
        (slope.abs() < 1e-12).any()
    ):
        return None
    mean = x.mean(1) - y.mean(1) / slope
    return mean.tolist(), slope.reciprocal().tolist()


def _in_code(values: list[float]) -> str:
    rounded = [round(value, 3) + 0.0 for value in values]
    return str(rounded[0]) if len(set(rounded)) == 1 else f"x.new_tensor({rounded}).view(-1, 1, 1)"
