"""Round trips: the model goes through a file for deployment, and comes back as another program."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, device_of, observed
from gradsigns_lightning.attacks.channels import check_preserved
from gradsigns_lightning.core.utils.optional import require


def torchscript_round_trip(
    model: nn.Module, data: AttackData, *, observe: Observe | None = None
) -> nn.Module:
    """Trace the model as TorchScript, freeze it (weights become constants), save and load it.

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the loaded program, at dose 1.

    Returns:
        The frozen program, which has no parameters but gradients with respect to its input.

    Raises:
        ValueError: the model cannot be traced, or computes differently afterwards.
    """
    with _converting(model, "TorchScript"):
        source = copied(model).requires_grad_(False)
        jit: Any = torch.jit
        program, file = jit.freeze(jit.trace(source, _example(model, data), check_trace=False)), io.BytesIO()
        jit.save(program, file)
        loaded = jit.load(io.BytesIO(file.getvalue()), map_location=device_of(model))
    return _done(model, _Program(loaded), data, observe)


@dataclass(frozen=True)
class TorchScriptRoundTrip(Attack):
    """Through a file of TorchScript; see :func:`torchscript_round_trip`."""

    function = staticmethod(torchscript_round_trip)


def export_round_trip(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Export the model by ``torch.export``, save and load it.

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the loaded program, at dose 1.

    Returns:
        A graph of tensor operations with the stolen weights, which takes batches of any size.

    Raises:
        ValueError: the model cannot be exported, or computes differently afterwards.
    """
    with _converting(model, "torch.export"):
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(copied(model), (_example(model, data),), dynamic_shapes=sizes)
        file = io.BytesIO()
        torch.export.save(program, file)
        loaded: Any = torch.export.load(io.BytesIO(file.getvalue())).module()
    return _done(model, _Program(loaded), data, observe)


@dataclass(frozen=True)
class ExportRoundTrip(Attack):
    """Through a file of torch.export; see :func:`export_round_trip`."""

    function = staticmethod(export_round_trip)


def onnx_round_trip(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Export the model as ONNX and let onnxruntime compute it, which folds and fuses what it can.

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the loaded program, at dose 1.

    Returns:
        A module that answers with the runtime's logits, on the CPU and without gradients.

    Raises:
        ValueError: the model cannot be exported, or computes differently afterwards.
        ImportError: onnxruntime is not installed.
    """
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    with _converting(model, "ONNX"):
        file = io.BytesIO()
        torch.onnx.export(
            copied(model),
            (_example(model, data),),
            file,  # type: ignore[arg-type]  # which torch takes where it does not use dynamo
            dynamo=False,
            input_names=["inputs"],
            output_names=["logits"],
            dynamic_axes={"inputs": {0: "n"}, "logits": {0: "n"}},
        )
    return _done(model, OnnxProgram(file.getvalue()).eval(), data, observe)


@dataclass(frozen=True)
class OnnxRoundTrip(Attack):
    """Through a file of ONNX; see :func:`onnx_round_trip`."""

    function = staticmethod(onnx_round_trip)
    kind = "responses"


class OnnxProgram(nn.Module):
    """A model in ONNX as a module that answers without gradients.

    Args:
        content: the bytes of the file.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._content = content
        self._session: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of inputs ``(n, C, H, W)``, where these are."""
        if self._session is None:
            onnxruntime = require("onnxruntime", extra="onnx")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
            self._session = onnxruntime.InferenceSession(
                self._content, options, providers=["CPUExecutionProvider"]
            )
        inputs = {"inputs": x.detach().to("cpu", torch.float32).numpy()}
        return torch.from_numpy(self._session.run(None, inputs)[0]).to(x.device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the session, which can be neither copied nor pickled; the next call opens another one."""
        return {**self.__dict__, "_session": None}


class _Program(nn.Module):
    """A loaded program; its mode of evaluation is part of it, and asking for another one may be an error."""

    def __init__(self, program: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def train(self, mode: bool = True) -> _Program:
        """Do nothing: there is no other mode."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of inputs ``(n, C, H, W)``."""
        logits: Tensor = self.program(x)
        return logits


@contextmanager
def _converting(model: nn.Module, form: str) -> Iterator[None]:
    """Name the model in the error of a conversion, and keep quiet what it warns of.

    Raises:
        ValueError: the conversion failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # each format has its own errors, and the model's code adds others
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(
                f"`model` must be convertible to {form}, got {type(model).__name__}, which raised {problem}"
            ) from error


def _example(model: nn.Module, data: AttackData) -> Tensor:
    """Return two of the thief's images: a batch of one would be taken for all that there is."""
    images: Tensor = next(iter(data.in_order(2)))[0]
    return images.to(device_of(model))


def _done(model: nn.Module, program: nn.Module, data: AttackData, observe: Observe | None) -> nn.Module:
    check_preserved(model, program, data)
    observed(observe, 1, program)
    return program
