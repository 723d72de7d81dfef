"""Rewrites of whole layers that leave the network's function as it is: folded, inserted and fused ones."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.attacks.channels import NORMS, check_preserved, put, traced

_LINEAR = (nn.Conv2d, nn.Linear)


def fold_batch_norm(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Merge batch normalization into the layers before it (Jacob et al., CVPR 2018, section 3.2).

    It is what deployment tools do, and leaves no layer in which a mark of the normalization's weights could
    be.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        observe: is shown the model, at dose 1.

    Raises:
        ValueError: the model cannot be traced, or no batch normalization follows a convolution or linear
            layer.
    """
    attacked = copied(model)
    pairs = [(a, b) for a, b in _in_a_row(attacked, NORMS) if _can_fold(attacked, a, b)]
    if not pairs:
        raise ValueError(
            "`model` must have batch normalization behind a convolution or linear layer, got "
            f"{type(model).__name__}."
        )
    for before, norm in pairs:
        layer, folded = attacked.get_submodule(before), attacked.get_submodule(norm)
        fuse: Any = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
        attacked.set_submodule(before, fuse(layer, folded))
        attacked.set_submodule(norm, nn.Identity())
    return _done(model, attacked, data, observe)


@dataclass(frozen=True)
class BatchNormFolding(Attack):
    """Folded batch normalization; see :func:`fold_batch_norm`."""

    function = staticmethod(fold_batch_norm)


def insert_layers(
    model: nn.Module, data: AttackData, *, seed: int = 0, observe: Observe | None = None
) -> nn.Module:
    """Replace each convolution and linear layer by the product of two.

    The layer is multiplied by a random matrix, which a second layer (a 1x1 convolution) takes back; both have
    nothing of the old weights to be seen. Deeper linear networks as over-parametrization are those of Arora
    et al. (ICML 2018); as an obfuscation the rewrite is this project's.

    Convolutions in groups stay.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        seed: of the matrices: orthogonal ones, with columns stretched by factors between 1/2 and 2.
        observe: is shown the model, at dose 1.

    Raises:
        ValueError: the model cannot be traced, or has no such layer.
    """
    attacked, random = copied(model), torch.Generator().manual_seed(seed)
    names = _linear_layers(attacked)
    if not names:
        raise ValueError(
            f"`model` must have a convolution or a linear layer, got {type(model).__name__} without any."
        )
    for name in names:
        layer: Any = attacked.get_submodule(name)
        n_out = layer.weight.shape[0]
        basis = torch.linalg.qr(torch.randn(n_out, n_out, generator=random, dtype=torch.float64))[0]
        stretch = 4 ** (torch.rand(n_out, generator=random, dtype=torch.float64) - 0.5)
        first, second = _multiplied(layer, (basis * stretch).T), _square(layer, basis / stretch)
        attacked.set_submodule(name, nn.Sequential(first, second))
    return _done(model, attacked, data, observe)


@dataclass(frozen=True)
class LayerInsertion(Attack):
    """Layers replaced by the product of two; see :func:`insert_layers`."""

    function = staticmethod(insert_layers)

    seed: int = 0


def fuse_layers(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Merge linear layers, and 1x1 convolutions, into the layer before, where nothing is between them.

    It takes :func:`insert_layers` back. Few networks have such layers; fold their batch normalization first.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        observe: is shown the model, at dose 1.

    Raises:
        ValueError: the model cannot be traced, or has no two such layers.
    """
    attacked, n_fused = copied(model), 0
    while pair := next(_fusable(attacked), None):
        before, after = pair
        first: Any = attacked.get_submodule(before)
        second: Any = attacked.get_submodule(after)
        attacked.set_submodule(before, _multiplied(first, _matrix(second), second.bias))
        attacked.set_submodule(after, nn.Identity())
        n_fused += 1
    if not n_fused:
        raise ValueError(
            f"`model` must have two linear layers with nothing between them, got {type(model).__name__}."
        )
    return _done(model, attacked, data, observe)


@dataclass(frozen=True)
class LayerFusion(Attack):
    """Linear layers merged; see :func:`fuse_layers`."""

    function = staticmethod(fuse_layers)


def _done(model: nn.Module, attacked: nn.Module, data: AttackData, observe: Observe | None) -> nn.Module:
    check_preserved(model, attacked.eval(), data)
    observed(observe, 1, attacked)
    return attacked


def _linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that the forward pass calls, but for convolutions in groups."""
    modules = dict(model.named_modules())
    names = dict.fromkeys(str(node.target) for node in traced(model).nodes if node.op == "call_module")
    return [n for n in names if isinstance(modules[n], _LINEAR) and getattr(modules[n], "groups", 1) == 1]


def _in_a_row(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    """Return layers that are called once, and the modules of some kinds that alone read their output."""
    graph, modules = traced(model), dict(model.named_modules())
    calls: list[Any] = [node for node in graph.nodes if node.op == "call_module"]
    n_calls = Counter(modules[str(node.target)] for node in calls)
    for before in calls:
        after: Any = next(iter(before.users), None)
        if len(before.users) != 1 or after not in calls:
            continue
        layer, module = modules[str(before.target)], modules[str(after.target)]
        if (
            isinstance(layer, _LINEAR)
            and isinstance(module, kinds)
            and n_calls[layer] == n_calls[module] == 1
        ):
            yield str(before.target), str(after.target)


def _can_fold(model: nn.Module, before: str, norm: str) -> bool:
    layer, folded = model.get_submodule(before), model.get_submodule(norm)
    if folded.running_mean is None:
        return False
    return isinstance(layer, nn.Conv2d) == isinstance(folded, nn.BatchNorm2d)


def _fusable(model: nn.Module) -> Iterator[tuple[str, str]]:
    for before, after in _in_a_row(model, _LINEAR):
        first, second = model.get_submodule(before), model.get_submodule(after)
        rows = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        if rows or (isinstance(first, nn.Conv2d) and first.groups == 1 and _is_matrix(second)):
            yield before, after


def _is_matrix(conv: nn.Module) -> bool:
    """Tell whether a layer is a convolution that multiplies each pixel's channels by a matrix."""
    if not isinstance(conv, nn.Conv2d):
        return False
    ones = conv.kernel_size == conv.stride == (1, 1)
    return ones and conv.padding in ((0, 0), "valid", "same") and conv.groups == 1


def _matrix(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.flatten(1)


def _multiplied(layer: Any, matrix: Tensor, bias: Tensor | None = None) -> Any:
    """Return a layer whose output channels are those of ``layer``, multiplied by a matrix, plus a bias."""
    matrix = matrix.to(device=layer.weight.device, dtype=torch.float64)
    product = copy.deepcopy(layer)
    weight = torch.tensordot(matrix, layer.weight.detach().double(), 1)
    product.weight = nn.Parameter(weight.to(layer.weight))
    terms = [] if layer.bias is None else [matrix @ layer.bias.detach().double()]
    terms += [] if bias is None else [bias.detach().double()]
    product.bias = nn.Parameter(sum(terms, torch.zeros(())).to(layer.weight)) if terms else None
    setattr(product, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(matrix))
    return product


def _square(layer: Any, matrix: Tensor) -> nn.Module:
    """Return a layer that multiplies the channels of the outputs of ``layer`` by a square matrix."""
    n, like = len(matrix), {"device": layer.weight.device, "dtype": layer.weight.dtype}
    kind, sizes = (nn.Conv2d, (n, n, 1)) if isinstance(layer, nn.Conv2d) else (nn.Linear, (n, n))
    empty: Any = nn.utils.skip_init  # a plain layer would draw random numbers
    square: nn.Module = empty(kind, *sizes, bias=False, **like)
    put(square, "weight", matrix.view(square.weight.shape))  # type: ignore[arg-type]
    return square
