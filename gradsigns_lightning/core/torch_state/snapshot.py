"""What a forward pass may change beside its answer, kept and put back: buffers, attributes, hooks, random states."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# PyTorch's own attributes of a module stay as they are, but for these two.
_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set"}
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

Restore = Callable[[], object]


@contextmanager
def side_effects_undone(module: nn.Module) -> Iterator[None]:
    """Put back all that passes through ``module`` change beside its parameters, also on exception.

    That is: buffers, changed in place or registered anew; attributes of modules and their lists, dictionaries
    and tensors (the states of metrics, counters, caches), also in dataclasses; modules within such lists; the
    random states of PyTorch, Python and NumPy, and of generators of theirs among the attributes. Hooks on the
    backward passes of modules, which belong to the task's own, are not called.

    Tensors are copied before and copied back, without a new version, so that graphs which saved them stay
    valid.
    """
    keeper = _Keeper()
    with ExitStack() as stack:
        for child in module.modules():
            keeper.keep_module(child)
        _keep_random_states(stack, keeper.devices())
        stack.callback(keeper.restore)
        stack.enter_context(_backward_hooks_set_aside(module))
        yield


class _Keeper:
    """Keeps objects as they are now, each once; :meth:`restore` puts them back in place."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # holds the objects too, so that ids stay theirs
        self._restores: list[Restore] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._parameter_devices: set[torch.device] = set()

    def keep_module(self, module: nn.Module) -> None:
        if not self._is_new(module):
            return
        self._parameter_devices |= {p.device for p in module._parameters.values() if p is not None}
        for buffer in module.buffers(recurse=False):
            self._keep_tensor(buffer)
        attributes = vars(module)
        if not isinstance(module, torch.jit.ScriptModule):  # whose attributes are on the other side
            kept = {name: value for name, value in attributes.items() if name not in _OWN}
            self._restores.append(lambda: _put_back(attributes, kept))
            for value in kept.values():
                self._keep(value)

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, copy in self._tensors:
                _copy_back(tensor, copy)
        for put_back in self._restores:
            put_back()

    def devices(self) -> list[torch.device]:
        """Return the devices of parameters, buffers and attributes, each once."""
        return list(self._parameter_devices | {tensor.device for tensor, _ in self._tensors})

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, (list, dict, set, deque)):
            self._keep_container(value)
        elif isinstance(value, tuple):
            self._keep_items(value)
        elif isinstance(value, nn.Module):
            for child in value.modules():
                self.keep_module(child)
        elif _is_plain_record(value):
            self._keep_record(value)
        elif (set_state := _setter_of_state(value)) is not None and self._is_new(value):
            self._restores.append(set_state)

    def _keep_record(self, record: Any) -> None:
        if self._is_new(record):
            attributes, kept = vars(record), dict(vars(record))
            self._restores.append(lambda: _refill(attributes, kept))
            self._keep_items(kept.values())

    def _keep_tensor(self, tensor: Tensor) -> None:
        # What requires a gradient is a parameter or made of some, and nothing that a pass may change in
        # place.
        if tensor.requires_grad or isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor):
            return
        if self._is_new(tensor):
            self._tensors.append((tensor, tensor.detach().clone()))

    def _keep_container(self, value: Any) -> None:
        if not self._is_new(value):
            return
        copy = _plain(value)
        self._restores.append(lambda: _refill(value, copy))
        self._keep_items(copy.values() if isinstance(copy, dict) else copy)

    def _keep_items(self, values: Any) -> None:
        for value in values:
            self._keep(value)

    def _is_new(self, value: Any) -> bool:
        known = id(value) in self._seen
        self._seen[id(value)] = value
        return not known


def _plain(value: Any) -> Any:
    return next(kind(value) for kind in (dict, set, list) if kind is list or isinstance(value, kind))


def _refill(value: Any, copy: Any) -> None:
    """Give a container the items of ``copy``, if it has others by now."""
    if isinstance(value, dict):
        if list(value) != list(copy) or any(value[key] is not copy[key] for key in copy):
            value.clear()
            value.update(copy)
    elif isinstance(value, set):
        if value != copy:
            value.clear()
            value.update(copy)
    elif len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True)):
        value.clear()
        value.extend(copy)


def _put_back(attributes: dict[str, Any], kept: dict[str, Any]) -> None:
    for name in [name for name in attributes if name not in _OWN and name not in kept]:
        del attributes[name]
    attributes.update(kept)


def _copy_back(tensor: Tensor, copy: Tensor) -> None:
    with torch.inference_mode() if tensor.is_inference() else torch.inference_mode(False):
        target = tensor.data  # the same memory, with a version of its own
        if target.shape != copy.shape:
            tensor.resize_(copy.shape)
            target = tensor.data
        target.copy_(copy)


def _is_plain_record(value: Any) -> bool:
    """Return whether a value is what steps keep their counts in; other objects may be anything, as large as a data set."""
    return (
        (is_dataclass(value) or isinstance(value, SimpleNamespace))
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
    )


def _setter_of_state(generator: Any) -> Restore | None:
    """Return what gives a random generator the state that it has now; None for another object."""
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        state: Any = generator.get_state()
        return partial(generator.set_state, state)
    # which has no state
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return None


def _keep_random_states(stack: ExitStack, devices: list[torch.device]) -> None:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    stack.callback(random.setstate, python)
    stack.callback(np.random.set_state, numpy)
    stack.callback(torch.set_rng_state, cpu)
    for device in devices:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        elif device.type == "mps":
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())


@contextmanager
def _backward_hooks_set_aside(module: nn.Module) -> Iterator[None]:
    hooked = [(vars(m), name) for m in module.modules() for name in _BACKWARD_HOOKS if vars(m).get(name)]
    kept = [(attributes, name, attributes[name]) for attributes, name in hooked]
    for attributes, name, hooks in kept:
        attributes[name] = type(hooks)()
    try:
        yield
    finally:
        for attributes, name, hooks in kept:
            attributes[name] = hooks
