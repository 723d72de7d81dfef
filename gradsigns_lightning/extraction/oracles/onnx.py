"""A model in an ONNX file.

The file may come from the accused, so the runtime is given the checked content alone, never a path: an ONNX file can name other
files, and other formats that the runtime reads by a file's ending are not checked here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradsigns_lightning.lazy import in_pythons_folder

_LARGEST = 2**31 - 1  # bytes of a protobuf message
_MAX_NODES, _MAX_INLINED = 1 << 20, 1 << 28  # what the runtime makes of functions that call functions: nodes, bytes
_MOST_MEMORY = 6 << 30  # bytes of all models: the largest file's weights, and 4 GiB to compute in
_FILE_READERS = ("EPContext",)  # operators that name a file
_STRING = 8  # TensorProto.STRING


class OnnxOracle:
    """Answers with an ONNX file's first output, on the CPU.

    The file must take one input ``(n, C, H, W)`` of float32, or of uint8 values 0 to 255. If it expects normalised images, wrap
    the oracle in :func:`normalised`.

    Args:
        path: the ONNX file.

    Raises:
        ValueError: the file is missing, no ONNX model, names other files, has sparse tensors, texts, or functions that grow
            beyond bounds, or takes something else than one image tensor.
        ImportError: onnx or onnxruntime is not installed.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            with in_pythons_folder():
                import onnxruntime
        except ImportError as error:
            raise ImportError("Reading an ONNX file needs onnxruntime: pip install 'gradsigns-lightning[onnx]'.") from error
        content = _checked_content(Path(path).expanduser())
        try:
            _bound_memory()
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.log_severity_level = 4  # it would write the model's own names to the terminal, as would the fallback
            self._session = onnxruntime.InferenceSession(
                content,
                sess_options=options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],  # it computes at once, in memory that is not bounded
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime's errors share no other base class
            raise ValueError(f"`path`: {str(path)!r} is damaged or no ONNX model that can be run.") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or inputs[0].type not in ("tensor(float)", "tensor(uint8)") or len(inputs[0].shape) != 4:
            found = ", ".join(f"{i.name!r} {i.type} {i.shape}" for i in inputs)
            raise ValueError(
                f"`path`: the model in {str(path)!r} must take one float32 or uint8 tensor (n, C, H, W), got {found}."
            )
        if not outputs or not outputs[0].type.startswith("tensor("):
            raise ValueError(f"`path`: the model in {str(path)!r} must return a tensor of scores first.")
        self._input, self._output = inputs[0], outputs[0]

    def __call__(self, images: Tensor) -> npt.NDArray[Any]:
        """Return the first output for raw images ``(n, C, H, W)``, float32.

        Raises:
            ValueError: the model cannot be run on them, or returns a single number.
        """
        array = images.detach().cpu().numpy()
        if self._input.type == "tensor(uint8)":
            array = np.rint(array * 255).astype(np.uint8)
        one_by_one = isinstance(self._input.shape[0], int)
        batches = np.split(array, len(array)) if one_by_one and self._input.shape[0] == 1 else [array]
        try:
            answers = [self._session.run([self._output.name], {self._input.name: batch})[0] for batch in batches]
        except Exception as error:  # onnxruntime's errors share no other base class
            raise ValueError(f"the ONNX model cannot be run on images {tuple(images.shape)}: {str(error)[:200]!r}.") from error
        if any(np.ndim(answer) == 0 for answer in answers):
            raise ValueError("the ONNX model must return a row of scores for each image, got a single number.")
        return np.concatenate(answers)


@lru_cache(maxsize=1)
def _bound_memory() -> None:
    """Give the sessions that ask for it, which are those of this module, an allocator that has no more than ``_MOST_MEMORY``."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    # As needed, not in powers of two, which would take up to twice as much.
    bounds = onnxruntime.OrtArenaCfg({"max_mem": _MOST_MEMORY, "arena_extend_strategy": 1})
    with suppress(Exception):  # the process has one of its own; onnxruntime's errors share no other base class
        onnxruntime.create_and_register_allocator(memory, bounds)


def _checked_content(file: Path) -> bytes:
    """Return the model in ``file``, written anew, so that the runtime reads what was checked and nothing else."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError("Reading an ONNX file needs onnx: pip install 'gradsigns-lightning[onnx]'.") from error
    if not file.is_file():
        raise ValueError(f"`path` must name an ONNX file, got {str(file)!r}, which is not there.")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"`path` must name an ONNX file below 2 GiB, got {str(file)!r} of {file.stat().st_size} bytes.")
    try:
        model = onnx.ModelProto.FromString(file.read_bytes())
    except Exception as error:  # protobuf's implementations raise errors of their own
        raise ValueError(f"`path`: {str(file)!r} is damaged or no ONNX model that can be run.") from error
    if not model.HasField("graph"):
        raise ValueError(f"`path`: {str(file)!r} is damaged or no ONNX model that can be run.")
    if any(_names_files(message) for message in _messages(model)):
        raise ValueError(f"`path`: the model in {str(file)!r} names other files; export it with its weights inside.")
    if any(message.DESCRIPTOR.name == "SparseTensorProto" for message in _messages(model)):
        raise ValueError(f"`path`: the model in {str(file)!r} must have no sparse tensors; export it with dense weights.")
    if _has_texts(model):
        raise ValueError(f"`path`: the model in {str(file)!r} must compute with numbers only; export the network alone.")
    if not _is_small_inlined(model):
        raise ValueError(
            f"`path`: the functions of the model in {str(file)!r} must not call themselves and come to at most {_MAX_NODES} "
            f"nodes and {_MAX_INLINED} bytes when each call is replaced by its function; export it without functions."
        )
    model.DiscardUnknownFields()
    checked: bytes = model.SerializeToString()
    return checked


def _names_files(message: Any) -> bool:
    """Tell whether a part of an ONNX model is a tensor or an operator whose content is in another file."""
    kind = message.DESCRIPTOR.name
    if kind == "TensorProto":
        return bool(message.data_location == message.EXTERNAL or message.external_data)
    return kind == "NodeProto" and message.op_type in _FILE_READERS


def _has_texts(model: Any) -> bool:
    """Tell whether a model has, or makes, tensors of texts, whose memory the runtime does not bound."""
    types = {"to"}  # the attribute that a cast's type is in, and those that it is taken from in functions' calls
    references = {(part.name, part.ref_attr_name) for part in _attributes(model) if part.ref_attr_name}
    while more := {source for name, source in references if name in types} - types:
        types |= more
    return any((part.name in types and part.i == _STRING) or _is_of_texts(part.name) for part in _attributes(model)) or any(
        message.data_type == _STRING or bool(message.string_data)
        for message in _messages(model)
        if message.DESCRIPTOR.name == "TensorProto"
    )


def _is_of_texts(name: str | bytes) -> bool:
    """Tell whether an operator's attribute of this name holds texts; protobuf gives a name that is no UTF-8 as bytes."""
    return isinstance(name, str) and name.endswith(("_string", "_strings"))


def _attributes(model: Any) -> Iterator[Any]:
    return (message for message in _messages(model) if message.DESCRIPTOR.name == "AttributeProto")


def _is_small_inlined(model: Any) -> bool:
    """Tell whether a model stays within bounds when the runtime replaces each call of a function by the function's nodes."""
    functions: dict[Any, list[Any]] = defaultdict(list)
    for function in model.functions:
        functions[_name(function, function.name)].append(function)
    calls = {name: [call for part in parts for call in _nodes(part)] for name, parts in functions.items()}
    sizes: dict[Any, tuple[int, int]] = {}
    try:
        for name in TopologicalSorter({name: {_name(n, n.op_type) for n in calls[name]} for name in calls}).static_order():
            if name in calls:
                n_nodes, n_bytes = _inlined(calls[name], sum(part.ByteSize() for part in functions[name]), sizes)
                sizes[name] = n_nodes, n_bytes + n_nodes * sum(_copied(part.attribute_proto) for part in functions[name])
    except CycleError:
        return False
    n_nodes, n_bytes = _inlined(_nodes(model.graph), 0, sizes)
    return n_nodes <= _MAX_NODES and n_bytes <= _MAX_INLINED


def _inlined(nodes: list[Any], n_bytes: int, sizes: dict[Any, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of nodes and bytes that ``nodes`` come to; a number beyond the bounds may be any such number."""
    n_nodes = len(nodes)
    for call in nodes:
        inner = sizes.get(_name(call, call.op_type))
        if inner:
            n_nodes += inner[0]
            n_bytes += inner[1] + inner[0] * _copied(call.attribute)
    return min(n_nodes, _MAX_NODES + 1), min(n_bytes, _MAX_INLINED + 1)


def _copied(attributes: Any) -> int:
    """Return the bytes that a function's node may copy by referring to its call's attributes; a graph is beyond bounds."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in attributes):
        return _MAX_INLINED + 1
    return sum(attribute.ByteSize() for attribute in attributes)


def _nodes(part: Any) -> list[Any]:
    return [message for message in _messages(part) if message.DESCRIPTOR.name == "NodeProto"]


def _name(part: Any, name: str) -> tuple[str, str, str]:
    """Return what a function and its calls have in common."""
    return "" if part.domain == "ai.onnx" else part.domain, name, getattr(part, "overload", "")


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it, at any depth: initializers, attributes, subgraphs, functions."""
    yield message
    if message.DESCRIPTOR.name == "TensorProto":
        return  # to list its fields would copy its numbers
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)
