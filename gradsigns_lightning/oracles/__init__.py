"""Oracles that :func:`verify_api` can query besides modules and callables: ONNX files and HTTP endpoints.

An oracle takes raw images and returns scores or labels. This package bounds the time and memory that foreign
files and replies can cost the reader. Nothing here depends on a key, except :func:`normalized`, which makes
the inputs that a key describes.
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
