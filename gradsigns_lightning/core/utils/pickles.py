"""Walks an untrusted pickle without building any of its objects.

Only plain values are known here. What may be named, called, built or fetched is decided by a subclass, which
gets outlines of the arguments. An outline never refers to itself, has a limited depth, and has a bounded size
when written out in full, so that a program that loads the pickle afterwards can hash, compare and print its
values in bounded time.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_STEPS = 2**20  # ten times what the largest network of torchvision needs
_DEEPEST = 64
_LARGEST = 2**23  # values, where every reference to a value counts again
_KEY_BOUND = 2**31  # no two smaller integers have the same hash, except -1 and -2

_SCALARS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), ("int", None)),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), ("str", None)),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"), ("bytes", None)),
    "BINFLOAT": ("float", None),
    "NONE": ("none", None),
    "NEWTRUE": ("bool", True),
    "NEWFALSE": ("bool", False),
}
_EMPTY: dict[str, Callable[[], Outline]] = {
    "EMPTY_TUPLE": lambda: Outline("tuple", []),
    "EMPTY_LIST": lambda: Outline("list", []),
    "EMPTY_DICT": lambda: Outline("dict", {}),
}


@dataclass(slots=True)
class Outline:
    """Describes a value that loading the pickle would build.

    Attributes:
        kind: ``int``, ``float``, ``bool``, ``none``, ``str``, ``bytes``, ``tuple``, ``list``, ``dict``,
            ``name``, or a kind of a subclass of :class:`PickleWalk`.
        content: the scalar, the list of outlines, or the dictionary from keys to outlines.
        depth: depth of nesting.
        size: number of values, where every reference counts.
        closed: it is part of another value and must not change any more.
    """

    kind: str
    content: Any = None
    depth: int = 1
    size: int = 1
    closed: bool = False


class PickleWalk:
    """Walks one pickle; subclasses decide what it may name, call, build and fetch.

    Args:
        pickled: the pickle.
    """

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled
        self._stack: list[Outline] = []
        self._marked: list[list[Outline]] = []
        self._memo: dict[int, Outline] = {}
        self._left = _MOST_STEPS

    def outline(self) -> Outline:
        """Return the outline of the pickled value.

        Raises:
            ValueError: the pickle contains anything that is not allowed; the message is the reason alone.
        """
        try:
            for code, argument, _ in pickletools.genops(self._pickled):
                self.spend(1)
                if code.name == "STOP":
                    break
                self._step(code.name, argument)
            return self._stack.pop()
        except (IndexError, KeyError) as error:
            raise ValueError("its description is damaged") from error

    def spend(self, steps: int) -> None:
        """Add the cost of loading a part of the pickle, in steps."""
        self._left -= steps
        if self._left < 0:
            raise ValueError("its description is too long")

    def name(self, name: str) -> Outline:
        """Return the outline of ``name``, a module and a name separated by a space."""
        raise ValueError(f"it names {name[:80]!r}")

    def call(self, function: Outline, arguments: Sequence[Outline]) -> Outline:
        """Return the outline of a call's result; ``arguments`` are closed."""
        raise ValueError("it calls something")

    def build(self, value: Outline, state: Outline) -> None:
        """Check a change of ``value``, which is open, by ``state``, which is closed."""
        raise ValueError("it changes something")

    def fetch(self, reference: Outline) -> Outline:
        """Return the outline of an object outside the pickle."""
        raise ValueError("it refers to something outside")

    def adopt(self, parent: Outline, parts: Sequence[Outline]) -> None:
        """Note that ``parts`` are now parts of ``parent``."""
        for part in parts:
            part.closed = True
            parent.depth = max(parent.depth, part.depth + 1)
            parent.size += part.size
        if parent.closed:
            raise ValueError("one of its values is changed after it was used")
        if parent.depth > _DEEPEST or parent.size > _LARGEST:
            raise ValueError("its values are nested too deep or repeated too often")

    def _step(self, code: str, argument: Any) -> None:
        if code in _SCALARS:
            self._stack.append(self._scalar(code, argument))
        elif code in _EMPTY:
            self._stack.append(_EMPTY[code]())
        elif code in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            # The code stands for a name that is composed of strings on the stack, or looked up by number.
            self._stack.append(self.name(str(argument) if code in ("GLOBAL", "INST") else code))
        elif code in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif code == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif code == "MARK":
            self._marked.append(self._stack)
            self._stack = []
        elif code in ("REDUCE", "BUILD", "BINPERSID"):
            self._called(code)
        elif code not in ("PROTO", "FRAME"):
            self._contained(code)

    @staticmethod
    def _scalar(code: str, argument: Any) -> Outline:
        kind, constant = _SCALARS[code]
        if code in ("BINSTRING", "SHORT_BINSTRING"):  # text of Python 2
            argument = argument.encode("latin-1")
        size = 1 + len(argument) // 64 if kind in ("str", "bytes") else 1
        return Outline(kind, argument if constant is None else constant, size=size)

    def _contained(self, code: str) -> None:
        if code.startswith("TUPLE"):
            parts = (
                self._since_mark()
                if code == "TUPLE"
                else [self._stack.pop() for _ in range(int(code[5:]))][::-1]
            )
            self._stack.append(Outline("tuple", parts))
            self.adopt(self._stack[-1], parts)
        elif code in ("APPEND", "APPENDS"):
            parts = [self._stack.pop()] if code == "APPEND" else self._since_mark()
            self._of_kind("list").content.extend(parts)
            self.adopt(self._stack[-1], parts)
        elif code in ("SETITEM", "SETITEMS"):
            self._set(
                [self._stack.pop(), self._stack.pop()][::-1] if code == "SETITEM" else self._since_mark()
            )
        else:
            raise ValueError(f"its step {code} does not make a plain value")

    def _set(self, pairs: list[Outline]) -> None:
        keys, values = pairs[::2], pairs[1::2]
        if len(keys) != len(values):
            raise ValueError("its description is damaged")
        for key in keys:
            if key.kind not in ("str", "bytes") and not (key.kind == "int" and abs(key.content) < _KEY_BOUND):
                raise ValueError(f"a key of a dictionary is neither text nor a small integer, but {key.kind}")
        self._of_kind("dict").content.update(
            (key.content, value) for key, value in zip(keys, values, strict=True)
        )
        self.adopt(self._stack[-1], pairs)

    def _called(self, code: str) -> None:
        if code == "BINPERSID":
            self._stack.append(self.fetch(self._stack.pop()))
            return
        last = self._stack.pop()
        if code == "BUILD":
            last.closed = True
            self.adopt(self._stack[-1], [last])
            self.build(self._stack[-1], last)
        elif last.kind == "tuple":
            self._stack[-1] = self.call(self._stack[-1], last.content)
        else:
            raise ValueError("its description is damaged")

    def _since_mark(self) -> list[Outline]:
        parts, self._stack = self._stack, self._marked.pop()
        return parts

    def _of_kind(self, kind: str) -> Outline:
        value = self._stack[-1]
        if value.kind != kind:
            raise ValueError(f"one of its values, of kind {value.kind}, is filled like a {kind}")
        return value
