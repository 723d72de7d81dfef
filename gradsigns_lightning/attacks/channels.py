"""Which layers of a network share their channels, found by tracing it.

A network computes the same when the channels between its layers are permuted, rescaled or doubled, as long as
all layers that make, normalize or read a channel are changed alike; residual connections tie many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradsigns_lightning.attacks.base import AttackData, copied, device_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_LAYERS = (nn.Conv2d, nn.Linear, *NORMS)
# Operations by their names without underscores, which are those of modules, functions and methods alike.
_POOLS = frozenset(("maxpool2d", "avgpool2d", "adaptiveavgpool2d", "adaptivemaxpool2d"))
_HOMOGENEOUS = _POOLS | {"relu", "leakyrelu", "identity", "dropout", "dropout2d", "contiguous", "clone"}
_ONE_SIDED = frozenset(("relu", "leakyrelu", "maxpool2d", "adaptivemaxpool2d"))  # keep no negative factors
_SATURATING = frozenset(("relu6", "sigmoid", "tanh", "hardswish", "hardtanh", "hardsigmoid"))
_ELEMENTWISE = _HOMOGENEOUS | _SATURATING | {"gelu", "silu", "mish", "elu", "selu", "softplus"}
_ADDS, _PRODUCTS = frozenset(("add", "iadd")), frozenset(("mul", "imul"))
_SPATIAL = ({2, 3}, {-1, -2})


@dataclass(eq=False)
class ChannelGroup:
    """Channels that can be changed as long as all layers of the group follow.

    Attributes:
        n_channels: how many they are.
        is_linear: whether nothing but linear operations is between the layers, which keep negative factors,
            too. Known of homogeneous groups only.
        makers: layers of which each output is a channel.
        norms: layers that work on each channel by itself: batch and layer normalization, depthwise
            convolutions.
        readers: layers whose inputs are the channels; of a flattened map each channel is several inputs in a
            row.
    """

    n_channels: int
    is_linear: bool = True
    makers: list[nn.Module] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    readers: list[nn.Module] = field(default_factory=list)


def traced(model: nn.Module) -> fx.Graph:
    """Return the graph of a model, in which the layers of PyTorch and their subclasses are single nodes.

    Raises:
        ValueError: the model's forward pass depends on its input's values, or torch.fx cannot follow it
            otherwise.
    """
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it is given no tensor
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(
            f"`model` must be traceable by torch.fx, got {type(model).__name__}, which raised {problem}"
        ) from error


def channel_groups(model: nn.Module, *, homogeneous: bool = False) -> list[ChannelGroup]:
    """Return the groups of channels that no input, output or unknown operation holds in place.

    Args:
        model: a network that torch.fx can trace.
        homogeneous: only those between which every operation keeps positive factors, as ReLU does.
            Normalization is then a reader, which absorbs its inputs' factors, and a maker.

    Raises:
        ValueError: it cannot be traced.
    """
    walk = _Walk(model, homogeneous=homogeneous)
    for node in traced(model).nodes:
        walk.visit(node)
    return walk.free_groups()


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a layer is a convolution of each channel by itself."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def check_preserved(
    before: nn.Module, after: nn.Module, data: AttackData, *, n_images: int = 64
) -> nn.Module:
    """Return the rewritten model if it computes what the stolen one does on the thief's images.

    Raises:
        ValueError: it does not, so the model's layers do something else than their types say.
    """
    inputs = next(iter(data.in_order(n_images)))[0].to(device_of(before))
    with torch.no_grad():
        expected = copied(before)(inputs)
        change = float((after(inputs) - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
    if not change < 1e-3:
        raise ValueError(
            f"`model` must compute as its layers' types say, got {type(before).__name__}, whose logits "
            f"this rewrite changes by {change:.1e}."
        )
    return after


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LAYERS) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Value:
    """Where the channels of a group are in a tensor: on axis 1 of a map, or on the last axis."""

    group: int
    is_map: bool
    is_flat: bool = False


class _Walk:
    """Follows the channels through a graph, node by node."""

    def __init__(self, model: nn.Module, *, homogeneous: bool) -> None:
        self._modules, self._homogeneous = dict(model.named_modules()), homogeneous
        self._groups: list[ChannelGroup] = []
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        self._one_sided: set[int] = set()
        self._values: dict[fx.Node, _Value | None] = {}
        self._seen: dict[Any, tuple[_Value | None, _Value | None]] = {}

    def visit(self, node: fx.Node) -> None:
        """Note what becomes of the channels in one operation."""
        inputs = [self._values.get(source) for source in node.all_input_nodes]
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        name = _name(node, module)
        result: _Value | None = None
        if self._is_layer(module):
            result = self._layer(module, inputs[0])
        elif name in (_HOMOGENEOUS if self._homogeneous else _ELEMENTWISE):
            result = inputs[0] if inputs else None
            if name in _ONE_SIDED and result is not None:
                self._one_sided.add(result.group)
        elif name in _ADDS or (name in _PRODUCTS and not self._homogeneous):
            result = self._joined(inputs, n_terms=len(node.args))
        elif (
            inputs and (value := inputs[0]) is not None and (reshaped := _reshaped(name, node, module, value))
        ):
            result = reshaped
        elif name not in ("size", "dim") and not (name == "getattr" and node.args[1] == "shape"):
            self._fix(*inputs)
        self._values[node] = result

    def free_groups(self) -> list[ChannelGroup]:
        """Return the groups that can be changed, whose channels some layer makes and another one reads."""
        fixed, merged = {self._root(group) for group in self._fixed}, dict[int, ChannelGroup]()
        for number, group in enumerate(self._groups):
            root = self._root(number)
            whole = merged.setdefault(root, ChannelGroup(group.n_channels))
            whole.is_linear &= number not in self._one_sided
            for kind in ("makers", "norms", "readers"):
                known = getattr(whole, kind)
                known += [module for module in getattr(group, kind) if not any(module is k for k in known)]
        return [g for root, g in merged.items() if root not in fixed and g.makers and g.readers]

    def _is_layer(self, module: nn.Module | None) -> bool:
        if isinstance(module, nn.LayerNorm):
            return len(module.normalized_shape) == 1 and not self._homogeneous
        if isinstance(module, NORMS) and self._homogeneous:
            return module.affine and module.running_mean is not None
        return isinstance(module, _LAYERS)

    def _layer(self, module: Any, value: _Value | None) -> _Value | None:
        result = self._made(module, value)
        if module in self._seen:  # called again: both calls have the same weights
            before = self._seen[module]
            self._joined([before[0], value], n_terms=2)
            return self._joined([before[1], result], n_terms=2)
        self._seen[module] = value, result
        return result

    def _made(self, module: Any, value: _Value | None) -> _Value | None:
        n_in = next(getattr(module, name) for name in _SIZES if hasattr(module, name))
        n_in = n_in[-1] if isinstance(n_in, Sequence) else n_in
        fits = value is not None and self._fits(module, value, n_in)
        if not fits:
            self._fix(value)
        each = is_depthwise(module) or isinstance(module, (*NORMS, nn.LayerNorm))
        if each and not self._homogeneous:
            if value is None or not fits:
                return None
            self._groups[value.group].norms.append(module)
            return value
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not each:
            self._fix(value)
            return None
        if value is not None and fits:
            self._groups[value.group].readers.append(module)
        is_map = value.is_map if each and value is not None else isinstance(module, nn.Conv2d)
        n_out = n_in if each else getattr(module, "out_channels", None) or module.out_features
        return self._new(n_out, module, is_map=is_map) if fits or not each else None

    def _fits(self, module: nn.Module, value: _Value, n_in: int) -> bool:
        n = self._groups[value.group].n_channels
        if isinstance(module, nn.Linear):
            return not value.is_map and n_in % n == 0 and (value.is_flat or n_in == n)
        maps_only = isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        return n_in == n and not value.is_flat and value.is_map == maps_only

    def _new(self, n_channels: int, maker: nn.Module, *, is_map: bool) -> _Value:
        self._groups.append(ChannelGroup(n_channels, makers=[maker]))
        self._parents.append(len(self._parents))
        return _Value(len(self._parents) - 1, is_map)

    def _joined(self, values: Sequence[_Value | None], *, n_terms: int) -> _Value | None:
        known = [value for value in values if value is not None]
        alike = {(v.is_map, v.is_flat, self._groups[v.group].n_channels) for v in known}
        constants = n_terms > len(values)  # numbers, which keep permutations but no factors
        if len(known) < len(values) or len(alike) > 1 or (constants and self._homogeneous):
            self._fix(*values)
            return None
        for value in known[1:]:
            self._parents[self._root(value.group)] = self._root(known[0].group)
        return known[0] if known else None

    def _fix(self, *values: _Value | None) -> None:
        self._fixed |= {value.group for value in values if value is not None}

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group


_SIZES = ("in_channels", "in_features", "num_features", "normalized_shape")


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__.lower()
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.replace("_", "").lower() if node.op.startswith("call") else ""


def _reshaped(name: str, node: fx.Node, module: Any, value: _Value) -> _Value | None:
    """Return where the channels are when a map was averaged over its positions or flattened, else None."""
    arguments: dict[str, Any] = dict(node.kwargs)
    rest = node.args[1:]
    if name == "mean" and value.is_map:
        dims = arguments.get("dim", rest[0] if rest else None)
        keeps = arguments.get("keepdim", len(rest) > 1 and rest[1])
        averaged = isinstance(dims, Sequence) and set(dims) in _SPATIAL
        return replace(value, is_map=bool(keeps)) if averaged else None
    if module is not None:
        flattened = name == "flatten" and (module.start_dim, module.end_dim) == (1, -1)
    elif name == "flatten":
        flattened = (arguments.get("start_dim", rest[0] if rest else 0), len(rest) < 2) == (1, True)
    else:
        flattened = name in ("view", "reshape") and rest[1:] == (-1,)
    return replace(value, is_map=False, is_flat=value.is_map or value.is_flat) if flattened else None


def per_channel(module: nn.Module) -> dict[str, Tensor]:
    """Return a layer's tensors whose first axis is that of its outputs, by name."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: value for name in names if (value := getattr(module, name, None)) is not None}


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by a tensor, of whatever size."""
    old = getattr(module, name)
    value = value.to(device=old.device, dtype=old.dtype)
    setattr(module, name, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)
