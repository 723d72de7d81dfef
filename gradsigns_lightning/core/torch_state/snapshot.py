"""Restores what a forward pass may change as a side effect: buffers, attributes, hooks, random states."""

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

# PyTorch's own attributes of a module are not restored, except for these two.
_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set"}
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

Restore = Callable[[], object]


@contextmanager
def side_effects_undone(module: nn.Module) -> Iterator[None]:
    """Restore everything that passes through ``module`` change except its parameters, also on exception.

    These are: buffers, changed in place or newly registered; attributes of modules with their lists,
    dictionaries and tensors (the states of metrics, counters, caches), also in dataclasses; modules in such
    lists; the random states of PyTorch, Python and NumPy, and of their generators among the attributes.
    Backward hooks of modules are not called, because they are meant for the task's own backward pass.

    Tensors are copied back without a new version, so that graphs which saved them stay valid.
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
    """Keeps the state of objects, each once; :meth:`restore` restores them in place."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that their ids are not reused
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
        if not isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
            kept = {name: value for name, value in attributes.items() if name not in _OWN}
            self._restores.append(lambda: _restore_attributes(attributes, kept))
            for value in kept.values():
                self._keep(value)

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, copy in self._tensors:
                _copy_back(tensor, copy)
        for restore in self._restores:
            restore()

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
        # A tensor that requires a gradient is a parameter or computed from some, which no pass changes in
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
    """Restore the items of a container from ``copy``, if they have changed."""
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


def _restore_attributes(attributes: dict[str, Any], kept: dict[str, Any]) -> None:
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
    """Return whether a value is a plain record, as steps keep counts in; other objects may be large."""
    return (
        (is_dataclass(value) or isinstance(value, SimpleNamespace))
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
    )


def _setter_of_state(generator: Any) -> Restore | None:
    """Return a function that restores a random generator's present state; None for any other object."""
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        state: Any = generator.get_state()
        return partial(generator.set_state, state)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return partial(generator.setstate, generator.getstate())  # a SystemRandom has no state
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
