"""A model in an ONNX file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


class OnnxOracle:
    """Answers with an ONNX file's first output, on the CPU.

    The file must take one input ``(n, C, H, W)`` of float32, or of uint8 values 0 to 255. If it expects normalised images, wrap
    the oracle in :func:`normalised`.

    Args:
        path: the ONNX file.

    Raises:
        ValueError: the file is missing, no ONNX model, or takes something else than one image tensor.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("Reading an ONNX file needs onnxruntime: pip install 'gradsigns-lightning[onnx]'.") from error
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"`path` must name an ONNX file, got '{path}', which is not there.")
        try:
            self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no other base class
            raise ValueError(f"`path`: '{path}' is damaged or no ONNX model that can be run.") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in ("tensor(float)", "tensor(uint8)") or len(inputs[0].shape) != 4:
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise ValueError(f"`path`: the model in '{path}' must take one float32 or uint8 tensor (n, C, H, W), got {found}.")
        self._input = inputs[0]

    def __call__(self, images: Tensor) -> npt.NDArray[Any]:
        """Return the first output for raw images ``(n, C, H, W)``, float32."""
        array = images.detach().cpu().numpy()
        if self._input.type == "tensor(uint8)":
            array = np.rint(array * 255).astype(np.uint8)
        one_by_one = isinstance(self._input.shape[0], int)
        batches = np.split(array, len(array)) if one_by_one and self._input.shape[0] == 1 else [array]
        return np.concatenate([self._session.run(None, {self._input.name: batch})[0] for batch in batches])
