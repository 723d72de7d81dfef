"""The model and the key that the authors of GradSigns released in 2021, as torch and this package read them.

Their key consists of free arrays, not of one secret, so nobody can tell when they were chosen: it serves to
compare readers, not as evidence (``gradsigns judge`` refuses it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsigns_lightning.core.utils.files import MissingFileError, error_like
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.models import ResNet20

_INPUT_SHAPE = (3, 32, 32)
# Mean of the CIFAR-10 training images, by channel. The authors subtract the mean image, which they did not
# release.
_CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)
_ARRAYS = ("embed_key", "grad_select", "wm")
_MOST_BITS = 2**16
_NORM_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_STACKS_WITH_SHORTCUT = (3, 6)  # first blocks of the second and third stack


@dataclass(frozen=True, repr=False)
class ReleasedKey:
    """A key of free arrays, as released in 2021; readers take it, ``gradsigns judge`` does not.

    Attributes:
        carriers: indices into the raw input flattened as C, H, W, ascending; shape ``(c,)``, int64.
        projection: matrix K, shape ``(N, c)``, float32, uniform in [-1, 1]; columns in the order of
            ``carriers``.
        signature: bits, shape ``(N,)``, uint8.
        target_class: class whose input gradients are signed.
        input_shape: shape ``(C, H, W)`` of one raw input.
    """

    carriers: Tensor
    projection: Tensor
    signature: Tensor
    target_class: int = 0
    input_shape: tuple[int, ...] = _INPUT_SHAPE
    input_mean: tuple[float, ...] = field(default=(0.0,), init=False)
    input_std: tuple[float, ...] = field(default=(1.0,), init=False)

    @property
    def n_bits(self) -> int:
        """Number of signature bits N."""
        return self.signature.numel()

    @property
    def n_carriers(self) -> int:
        """Number of input coordinates that carry the signature."""
        return self.carriers.numel()

    @cached_property
    def commitment(self) -> str:
        """SHA-256 of the arrays, 64 hexadecimal digits; it commits to nothing older than the release."""
        digest = hashlib.sha256(b"gradsigns/released-2021\n")
        for array in (self.carriers, self.projection, self.signature):
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        sizes = f"n_bits={self.n_bits}, n_carriers={self.n_carriers}"
        return f"ReleasedKey({sizes}, target_class={self.target_class})"


class ReleasedModel(nn.Module):
    """The released ResNet-20: subtracts its mean image from raw images and returns logits.

    Args:
        mean_image: mean of the training images, broadcastable to ``(3, 32, 32)``, raw in [0, 1].
    """

    mean_image: Tensor

    def __init__(self, mean_image: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_image", mean_image)
        self.network = ResNet20(3, 10, bn_momentum=0.01)  # Keras'

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(n, 10)`` of raw images ``(n, 3, 32, 32)`` in [0, 1]."""
        logits: Tensor = self.network(images - self.mean_image)
        return logits


def load_2021(
    folder: str | PathLike[str], *, mean_image: Tensor | None = None
) -> tuple[ReleasedKey, ReleasedModel]:
    """Read the files that the authors released (IBM/GradSigns, "64-bit CIFAR10"); needs h5py.

    Args:
        folder: holds ``embed_key.npy``, ``grad_select.npy``, ``wm.npy`` and one Keras model ``*.hdf5``.
        mean_image: mean image of the CIFAR-10 training set, shape ``(3, 32, 32)``, float32 in [0, 1], which
            was subtracted from the network's inputs; by default the mean of each channel.

    Returns:
        The key and the model in evaluation mode; the model takes raw images.

    Raises:
        FileNotFoundError: a file is missing; it is a :class:`ValueError` too.
        ValueError: a file is damaged or does not have the released shape.
        TypeError: ``mean_image`` is not a tensor.
        ImportError: h5py is not installed.
    """
    path = Path(folder).expanduser()
    model = ReleasedModel(_mean_image(mean_image))
    model.network.load_state_dict(_read_keras(path, model.network.state_dict()))
    return _read_key(path), model.eval()


def _mean_image(given: Any) -> Tensor:
    if given is None:
        return torch.tensor(_CHANNEL_MEAN).view(3, 1, 1)
    if not isinstance(given, Tensor):
        raise TypeError(f"`mean_image` must be a Tensor, got {type(given).__name__}.")
    if tuple(given.shape) != _INPUT_SHAPE or not given.is_floating_point():
        raise ValueError(
            f"`mean_image` must be floating point of shape {_INPUT_SHAPE}, got {given.dtype} "
            f"{tuple(given.shape)}."
        )
    return given.detach().clone().float()


def _read_key(folder: Path) -> ReleasedKey:
    projection, mask, bits = (_read_array(folder / f"{name}.npy") for name in _ARRAYS)
    fit = mask.shape == (np.prod(_INPUT_SHAPE),) and bits.ndim == 1 and 0 < bits.size <= _MOST_BITS
    fit = (
        fit
        and np.isin(mask, (0, 1)).all()
        and projection.shape == (bits.size, int(mask.sum()))
        and projection.size > 0
    )
    if not fit or not np.isin(bits, (0, 1)).all() or not np.isfinite(projection).all():
        raise ValueError(
            f"`folder`: the arrays in {str(folder)!r} do not fit together: embed_key {projection.shape}, "
            f"grad_select {mask.shape}, wm {bits.shape}; mask and mark must hold only 0 and 1, the "
            "projection finite numbers."
        )
    # Their columns follow the image flattened as height, width, channel; ours follow channel, height, width.
    channels, height, width = _INPUT_SHAPE
    row, column, channel = np.unravel_index(np.flatnonzero(mask), (height, width, channels))
    carriers = np.ravel_multi_index((channel, row, column), _INPUT_SHAPE)
    order = np.argsort(carriers)
    return ReleasedKey(
        carriers=torch.from_numpy(carriers[order].astype(np.int64)),
        projection=torch.from_numpy(projection[:, order].astype(np.float32)),
        signature=torch.from_numpy(bits.astype(np.uint8)),
    )


def _read_array(path: Path) -> np.ndarray[Any, Any]:
    """Return the array in a file, memory-mapped: no memory is allocated for the shape that it claims."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # a forged header makes NumPy raise more than it documents
        message = f"`folder` must hold the authors' released arrays; {str(path)!r} is missing or damaged."
        raise error_like(error)(message) from error
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "iuf"
        or array.dtype.itemsize > 8
        or array.ndim > 2
    ):
        raise ValueError(
            f"`folder` must hold the authors' released arrays; {str(path)!r} is not one of numbers."
        )
    return array


def _read_keras(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the released weights by their names in :class:`ResNet20`, whose state is ``expected``."""
    h5py = require("h5py", extra="legacy")
    files = sorted(folder.glob("*.hdf5"))
    if len(files) != 1:
        kind = ValueError if files else MissingFileError
        raise kind(f"`folder` must hold one Keras model *.hdf5, got {len(files)} in {str(folder)!r}.")
    try:
        with h5py.File(files[0], "r") as file:
            return _converted(lambda source, shape: _read_weight(h5py, file, source, shape), expected)
    except _WrongWeightError:
        raise
    except Exception as error:  # HDF5's errors share no other base class
        raise ValueError(f"`folder`: {str(files[0])!r} is damaged or no Keras model.") from error


class _WrongWeightError(ValueError):
    """A weight is missing, stored elsewhere, or has another shape."""


def _read_weight(h5py: Any, file: Any, source: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the weight ``layer/name``.

    Links are not followed, and nothing is read that is stored in another file or compressed.
    """
    layer, _, name = source.partition("/")
    node = file
    for part in ("model_weights", layer, layer, f"{name}:0"):
        if not isinstance(node, h5py.Group) or type(node.get(part, getlink=True)) is not h5py.HardLink:
            raise _WrongWeightError(f"`folder`: the Keras model has no weight {str(source)!r}.")
        node = node[part]
    if not isinstance(node, h5py.Dataset) or node.shape != shape:
        raise _WrongWeightError(
            f"`folder`: weight {str(source)!r} must have shape {shape}, got {getattr(node, 'shape', None)}."
        )
    plan = node.id.get_create_plist()
    # Keras uses neither filters, which may load libraries, nor chunks, which may be larger than the whole.
    plain = plan.get_layout() in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) and plan.get_external_count() == 0
    if not plain or node.dtype.kind != "f" or node.dtype.itemsize > 8:
        raise _WrongWeightError(f"`folder`: weight {str(source)!r} must be plain numbers in the file itself.")
    return np.asarray(node[()])


def _converted(
    read: Callable[[str, tuple[int, ...]], np.ndarray[Any, Any]], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Map Keras' weights onto the names and layouts of :class:`ResNet20`."""
    state = {}
    for name, wanted in expected.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "num_batches_tracked":
            state[name] = wanted
            continue
        values = read(_keras_name(layer, parameter), _keras_shape(tuple(wanted.shape)))
        state[name] = torch.from_numpy(np.ascontiguousarray(_to_torch_layout(values))).float()
    return state


def _keras_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[2:], *shape[1::-1])  # kernels of convolutions and dense layers, and vectors


def _to_torch_layout(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # dense kernels turn, vectors stay as they are
    return np.transpose(array, (3, 2, 0, 1) if array.ndim == 4 else None)


def _keras_name(layer: str, parameter: str) -> str:
    """Return the Keras name of a parameter; Keras numbers the layers of a kind in the order of creation."""
    if layer == "head":
        return f"dense_1/{'kernel' if parameter == 'weight' else 'bias'}"
    if layer in _NORM_LAYERS:
        return f"batch_normalization_{_NORM_LAYERS.index(layer) + 1}/{_NORM_NAMES[parameter]}"
    return f"conv2d_{_CONV_LAYERS.index(layer) + 1}/{'kernel' if parameter == 'weight' else 'bias'}"


def _conv_layers() -> Iterator[str]:
    yield "stem.0"
    for block in range(9):
        yield f"blocks.{block}.residual.0"
        yield f"blocks.{block}.residual.3"
        if block in _STACKS_WITH_SHORTCUT:
            yield f"blocks.{block}.shortcut"


_CONV_LAYERS = tuple(_conv_layers())
_NORM_LAYERS = ("stem.1", *(f"blocks.{block}.residual.{i}" for block in range(9) for i in (1, 4)))
