"""The only patch of user code: it adds a term to the loss that a module's ``training_step`` returns.

Lightning itself wraps this method on the instance (for ``torch.compile``), so strategies look it up there. A
hook such as ``on_before_backward`` would come too late: there the loss is already divided by the accumulation
and scaled for float16, and the embedding pass would run outside the distributed strategy's forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

ExtraLoss = Callable[[Any], Tensor | None]


class StepPatch:
    """Wraps ``module.training_step`` on the instance until :meth:`remove` is called.

    Args:
        module: a LightningModule.
        extra_loss: maps the batch to a scalar that is added to the loss, or to None; called before the step,
            so that its memory is free again when the step needs its own.
        unused: called when the step returned None and the scalar was not used.
    """

    def __init__(
        self, module: LightningModule, extra_loss: ExtraLoss, unused: Callable[[], None] = lambda: None
    ) -> None:
        self.called = False  # since it was last set to False, see `StepWrapper.renew`
        self._module = module
        self._active = True
        self._previous = vars(module).get("training_step")
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            extra = extra_loss(_batch_of(args, kwargs)) if self._active else None
            output = step(*args, **kwargs)
            if extra is None:
                return output
            if output is None:
                unused()
                return None
            return _add(output, extra)

        # Lightning looks for `batch_idx` in the signature and unwraps only once.
        vars(training_step)["__wrapped__"] = inspect.unwrap(step)
        vars(training_step)["_step_patch"] = self
        self._wrapper = training_step
        module.training_step = training_step  # type: ignore[method-assign]
        self._state = _PlainState.of(module)
        self._state.patches.append(self)

    def remove(self) -> None:
        """Remove the wrapper, or disable it until the wrappers on top of it are removed."""
        if self._active:
            self._state.drop(self)
        self._active = False
        # Lightning removes the first installed first, so the last one clears all that were disabled below it.
        while (patch := _topmost(self._module)) is not None and not patch._active:
            patch._restore()

    def _restore(self) -> None:
        if self._previous is None:
            del self._module.training_step
        else:
            self._module.training_step = self._previous  # type: ignore[method-assign]


class StepWrapper:
    """Keeps a module's step wrapped during a fit, even if the module replaces the step."""

    def __init__(self) -> None:
        self._patch: StepPatch | None = None
        self._made_by: Callable[[], StepPatch] | None = None

    def wrap(self, module: LightningModule, extra_loss: ExtraLoss, unused: Callable[[], None]) -> None:
        """Wrap the step; see :class:`StepPatch`."""
        self._made_by = functools.partial(StepPatch, module, extra_loss, unused)
        self._patch = self._made_by()

    def renew(self) -> None:
        """Wrap again after a batch in which another step was called, as in a training in phases."""
        if self._patch is None or self._made_by is None:
            return
        if self._patch.called:
            self._patch.called = False
            return
        self._patch.remove()
        self._patch = self._made_by()

    def remove(self) -> None:
        """Remove the wrapper."""
        if self._patch is not None:
            self._patch.remove()
        self._patch = self._made_by = None


class _PlainState:
    """Leaves the wrappers out of pickles and copies of a module whose step is wrapped.

    It is set as ``__getstate__`` on the instance: a wrapper cannot be pickled, and in a deep copy it would
    train the original.
    """

    def __init__(self, module: LightningModule) -> None:
        self.patches: list[StepPatch] = []
        self._module = module
        self._previous = vars(module).get("__getstate__")
        self._inherited = getattr(module, "__getstate__", None)  # object has one from Python 3.11 on
        module.__getstate__ = self  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: LightningModule) -> _PlainState:
        there = vars(module).get("__getstate__")
        return there if isinstance(there, cls) else cls(module)

    def __call__(self) -> Any:
        state = vars(self._module) if self._inherited is None else self._inherited()
        if not isinstance(state, dict):
            return state
        plain = {
            name: value for name, value in state.items() if name not in ("training_step", "__getstate__")
        }
        step = state.get("training_step")
        while (patch := _patch_of(step)) is not None:
            step = patch._previous
        own = {"training_step": step, "__getstate__": self._previous}
        return plain | {name: value for name, value in own.items() if name in state and value is not None}

    def drop(self, patch: StepPatch) -> None:
        self.patches.remove(patch)
        if self.patches:
            return
        del self._module.__getstate__
        if self._previous is not None:
            self._module.__getstate__ = self._previous  # type: ignore[method-assign]


def _topmost(module: LightningModule) -> StepPatch | None:
    return _patch_of(vars(module).get("training_step"))


def _patch_of(step: Any) -> StepPatch | None:
    patch = getattr(step, "_step_patch", None)
    # Another wrapper made by `functools.wraps` carries a copy of the attribute.
    return patch if patch is not None and patch._wrapper is step else None


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["batch"] if "batch" in kwargs else next(iter(kwargs.values()))


def _add(output: Any, extra: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + extra
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + extra}
    raise TypeError(
        "`training_step` must return a tensor, a mapping with a tensor `loss`, or None, got "
        f"{type(output).__name__}."
    )
