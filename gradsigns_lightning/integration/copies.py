"""Copies and pickles of a callback that a module brings, even in the middle of a fit."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from multiprocessing.context import get_spawning_popen
from typing import Any

from typing_extensions import Self


class LeavesNoKeyBehind(ABC):
    """Base of a callback that goes into deep copies and child processes of its module, but not into files.

    A derived class has ``brought``, whether a module brings the callback, and :meth:`_outside_a_fit`.
    """

    brought: bool

    @abstractmethod
    def _outside_a_fit(self) -> dict[str, Any]:
        """Return fresh attributes for a copy, in place of those that belong to the running fit."""

    def __copy__(self) -> Self:
        return self._with(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = self._with({})
        vars(copied).update(copy.deepcopy(vars(self) | self._outside_a_fit(), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.brought and get_spawning_popen() is None:
            return type(None), ()  # a saved module has None in its place, which `fit` reports
        return super().__reduce_ex__(protocol)

    def _with(self, attributes: dict[str, Any]) -> Self:
        new = type(self).__new__(type(self))
        vars(new).update(attributes)
        return new
