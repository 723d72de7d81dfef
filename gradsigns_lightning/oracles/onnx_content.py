"""Checking the content of an ONNX file before the runtime sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from gradsigns_lightning.core.utils.files import error_about
from gradsigns_lightning.core.utils.optional import require

_LARGEST = 2**31 - 1  # bytes of a protobuf message
# nodes and bytes after the runtime has inlined all functions
_MAX_NODES, _MAX_INLINED = 1 << 18, 1 << 28
_NODES_OF_A_GRAPH = 8  # a subgraph in a node takes as much memory as this many nodes
# Bytes that the parts of a file take in memory once the runtime has parsed them; more than was measured.
_MOST_TAKEN = 1 << 31
_TAKES = {"GraphProto": 1 << 15, "NodeProto": 1 << 12}
_MESSAGE_TAKES, _FIELD_TAKES, _NUMBER_TAKES = 1 << 10, 1 << 8, 1 << 3
_AS_LONG_AS_THEY_ARE = (5, 6, 9)  # C++ types of fields that do not grow when parsed: double, float, string
_LONGEST_NUMBER = 10  # bytes
_FILE_READERS = ("EPContext",)  # operators that refer to a file
# operators that allocate memory outside any allocator, as much as a few bytes of the file ask for
_GREEDY = ("RoiAlign",)
_STRING = 8  # TensorProto.STRING


def checked_content(file: Path) -> bytes:
    """Return the model in ``file``, serialized again, so that the runtime reads exactly what was checked.

    Raises:
        ValueError: the file is not a model, or contains something that :class:`OnnxOracle` refuses.
        ImportError: onnx is not installed.
    """
    onnx = require("onnx", extra="onnx")
    if not file.is_file():
        raise error_about(file)(f"`path` must name an ONNX file, got {str(file)!r}, which is not there.")
    if file.stat().st_size > _LARGEST:
        raise ValueError(
            f"`path` must name an ONNX file below 2 GiB, got {str(file)!r} of {file.stat().st_size} bytes."
        )
    model = _parsed(file, onnx.ModelProto)
    if any(_names_files(message) for message in _messages(model)):
        raise ValueError(
            f"`path`: the model in {str(file)!r} refers to other files; export it with its weights inside."
        )
    if any(message.DESCRIPTOR.name == "SparseTensorProto" for message in _messages(model)):
        raise ValueError(
            f"`path`: the model in {str(file)!r} must have no sparse tensors; export it with dense weights."
        )
    if any(
        message.DESCRIPTOR.name == "NodeProto" and message.op_type in _GREEDY for message in _messages(model)
    ):
        raise ValueError(
            f"`path`: the model in {str(file)!r} must not use {', '.join(_GREEDY)}; export the network alone."
        )
    if _has_texts(model):
        raise ValueError(
            f"`path`: the model in {str(file)!r} must compute with numbers only; export the network alone."
        )
    if not _is_small_inlined(model):
        raise ValueError(
            f"`path`: the functions of the model in {str(file)!r} must not call themselves, and must take "
            f"at most {_MAX_NODES} nodes and {_MAX_INLINED} bytes when inlined; export it without functions."
        )
    model.DiscardUnknownFields()
    checked: bytes = model.SerializeToString()
    return checked


def _parsed(file: Path, kind: Any) -> Any:
    content = file.read_bytes()
    try:
        is_small = _taken(content, kind.DESCRIPTOR) <= _MOST_TAKEN
        model = kind.FromString(content) if is_small else None
    except Exception as error:  # protobuf's implementations raise errors of their own
        raise ValueError(f"`path`: {str(file)!r} is damaged or not an ONNX model that can be run.") from error
    if model is None:
        most = f"at most {_MOST_TAKEN >> 30} GiB in memory besides its weights"
        raise ValueError(
            f"`path`: the model in {str(file)!r} must take {most}; it has too many nodes or other parts, or "
            "integers that are not raw data."
        )
    if not model.HasField("graph"):
        raise ValueError(f"`path`: {str(file)!r} is damaged or not an ONNX model that can be run.")
    return model


def _taken(content: bytes, kind: Any) -> int:
    """Return the bytes that a protobuf message of some kind takes in memory, without parsing it into objects.

    Raises:
        ValueError: the message is damaged.
    """
    taken, pending = 0, [(0, len(content), kind)]
    while pending:
        position, end, kind = pending.pop()
        while position < end and taken <= _MOST_TAKEN:
            tag, position = _number(content, position)
            field, taken = kind.fields_by_number.get(tag >> 3), taken + _FIELD_TAKES
            match tag & 7:
                case 0:
                    _, position = _number(content, position)
                case 1:
                    position += 8
                case 2:
                    length, position = _number(content, position)
                    if field is not None and field.message_type is not None:
                        pending.append((position, position + length, field.message_type))
                        taken += _TAKES.get(field.message_type.name, _MESSAGE_TAKES)
                    elif field is not None and field.cpp_type not in _AS_LONG_AS_THEY_ARE:
                        taken += length * _NUMBER_TAKES
                    position += length
                case 5:
                    position += 4
                case _:
                    raise ValueError("it has groups")
        if position > end:
            raise ValueError("a part is longer than what it is in")
    return taken


def _number(content: bytes, position: int) -> tuple[int, int]:
    """Return the protobuf varint at a position, and the position after it."""
    value = content[position]
    if value < 128:  # nearly all
        return value, position + 1
    value = 0
    for i in range(_LONGEST_NUMBER):
        byte = content[position + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise ValueError("a number is too long")


def _names_files(message: Any) -> bool:
    """Tell whether a message is a tensor or an operator whose content is in another file."""
    kind = message.DESCRIPTOR.name
    if kind == "TensorProto":
        return bool(message.data_location == message.EXTERNAL or message.external_data)
    return kind == "NodeProto" and message.op_type in _FILE_READERS


def _has_texts(model: Any) -> bool:
    """Tell whether a model has, or makes, tensors of strings, whose memory the runtime does not bound."""
    # the attribute with a cast's type, and the attributes of function calls that it may refer to
    types = {"to"}
    references = {(part.name, part.ref_attr_name) for part in _attributes(model) if part.ref_attr_name}
    while more := {source for name, source in references if name in types} - types:
        types |= more
    return any(
        (part.name in types and part.i == _STRING) or _is_of_texts(part.name) for part in _attributes(model)
    ) or any(
        message.data_type == _STRING or bool(message.string_data)
        for message in _messages(model)
        if message.DESCRIPTOR.name == "TensorProto"
    )


def _is_of_texts(name: str | bytes) -> bool:
    """Tell whether an operator's attribute of this name holds strings."""
    # protobuf returns a name that is not UTF-8 as bytes
    return isinstance(name, str) and name.endswith(("_string", "_strings"))


def _attributes(model: Any) -> Iterator[Any]:
    return (message for message in _messages(model) if message.DESCRIPTOR.name == "AttributeProto")


def _is_small_inlined(model: Any) -> bool:
    """Tell whether a model stays within bounds when the runtime inlines its functions."""
    functions: dict[Any, list[Any]] = defaultdict(list)
    for function in model.functions:
        functions[_name(function, function.name)].append(function)
    calls = {name: [call for part in parts for call in _nodes(part)] for name, parts in functions.items()}
    sizes: dict[Any, tuple[int, int]] = {}
    try:
        for name in TopologicalSorter(
            {name: {_name(n, n.op_type) for n in calls[name]} for name in calls}
        ).static_order():
            if name in calls:
                n_bytes = sum(part.ByteSize() for part in functions[name])
                n_nodes, n_bytes = _inlined(calls[name], _n_graphs(functions[name]), n_bytes, sizes)
                sizes[name] = (
                    n_nodes,
                    n_bytes + n_nodes * sum(_copied(part.attribute_proto) for part in functions[name]),
                )
    except CycleError:
        return False
    n_nodes, n_bytes = _inlined(_nodes(model.graph), _n_graphs([model.graph]), 0, sizes)
    return n_nodes <= _MAX_NODES and n_bytes <= _MAX_INLINED


def _inlined(
    nodes: list[Any], n_graphs: int, n_bytes: int, sizes: dict[Any, tuple[int, int]]
) -> tuple[int, int]:
    """Return how many nodes and bytes ``nodes`` take when inlined, each cut off above its bound."""
    n_nodes = len(nodes) + _NODES_OF_A_GRAPH * n_graphs
    for call in nodes:
        inner = sizes.get(_name(call, call.op_type))
        if inner:
            n_nodes += inner[0]
            n_bytes += inner[1] + inner[0] * _copied(call.attribute)
    return min(n_nodes, _MAX_NODES + 1), min(n_bytes, _MAX_INLINED + 1)


def _copied(attributes: Any) -> int:
    """Return the bytes that a function's node may copy by referring to its call's attributes."""
    # a subgraph among them is beyond any bound
    if any(attribute.HasField("g") or attribute.graphs for attribute in attributes):
        return _MAX_INLINED + 1
    return sum(attribute.ByteSize() for attribute in attributes)


def _nodes(part: Any) -> list[Any]:
    return [message for message in _messages(part) if message.DESCRIPTOR.name == "NodeProto"]


def _n_graphs(parts: list[Any]) -> int:
    return sum(message.DESCRIPTOR.name == "GraphProto" for part in parts for message in _messages(part))


def _name(part: Any, name: str) -> tuple[str, str, str]:
    """Return the identifier that a function shares with its calls: domain, name and overload."""
    return "" if part.domain == "ai.onnx" else part.domain, name, getattr(part, "overload", "")


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it, at any depth."""
    yield message
    if message.DESCRIPTOR.name == "TensorProto":
        return  # listing its fields would copy its numbers
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)
