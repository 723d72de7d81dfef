"""What :func:`verify_api` can ask besides modules and callables: ONNX files and HTTP endpoints.

An oracle takes raw images and gives scores or labels; what its files and replies may make the reader do is
bounded here. Nothing here knows a key, except that :func:`normalized` makes the inputs that a key describes.
"""

from gradsigns_lightning.oracles.http import HttpOracle, OracleError
from gradsigns_lightning.oracles.onnx import OnnxOracle
from gradsigns_lightning.oracles.protocols import (
    JsonTemplate,
    MlflowProtocol,
    OpenInferenceProtocol,
    WireProtocol,
)
from gradsigns_lightning.verification.api.queries import normalized

__all__ = [
    "HttpOracle",
    "JsonTemplate",
    "MlflowProtocol",
    "OnnxOracle",
    "OpenInferenceProtocol",
    "OracleError",
    "WireProtocol",
    "normalized",
]
