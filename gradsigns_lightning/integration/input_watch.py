"""Does the step give the network the images of its batch, or others, which it normalized itself?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.checking import N_IMAGES

_TOLERANCE = 0.02  # of the spread; half precision rounds
_ELSEWHERE = 0.5  # a mean moved by more of the spread, or a spread changed by more, is no augmentation


class InputWatch:
    """Compares what reaches the network's first layer from the logits hook with what reaches it from the step.

    Augmentation inside the step is let pass: it keeps the range of the images.

    Args:
        module: the LightningModule; None watches nothing.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        module = nn.Module() if module is None else module
        # A compiled network would be compiled anew for a hook.
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
        """Note the layer that is called first with some samples, and its input."""
        handles = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch_the_step(self) -> None:
        """Compare the layer's next input with the noted one, and warn if it is another."""
        if self._first is not None and self._handle is None:
            self._handle = self._first.register_forward_pre_hook(self._compare)

    def stop(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._first = self._expected = None
        self._layers = []  # a copy of the callback shall not copy the network

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
                f"would be embedded on "
                "images that the network never gets, and read on others. Change the images in the data set "
                "instead, or override "
                "`GradSigns.images_and_labels` in a subclass to return them as the network gets them:\n"
                f"    def images_and_labels(self, batch): x, y = super().images_and_labels(batch); return "
                f"{difference[1]}, y\n"
                "The key's `input_mean` and `input_std` must say how they are normalized.",
                UserWarning,
                stacklevel=2,
            )


def _is_layer(module: nn.Module) -> bool:
    foreign = isinstance(module, torch.jit.ScriptModule) or "parametrizations" in type(module).__module__
    return not foreign and next(module.children(), None) is None


def _difference(expected: Tensor, found: Tensor) -> tuple[str, str] | None:
    """Return in words, and in code, how the images differ; None if they are the same or an augmentation's."""
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
        return f"they are {code}, x those of the batch", code
    moved = (found.mean() - mean).abs() > _ELSEWHERE * spread
    ratio = found.std() / spread
    if bool(moved) or not _ELSEWHERE <= float(ratio) <= 1 / _ELSEWHERE:
        ends = [f"{float(end):.3g}" for tensor in (found, expected) for end in tensor.aminmax()]
        return "they range from {} to {}, the batch's from {} to {}".format(*ends), "self.as_the_step_does(x)"
    return None


def _normalization(expected: Tensor, found: Tensor) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation, by channel, of the normalization that makes one from the other, if one does."""
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
