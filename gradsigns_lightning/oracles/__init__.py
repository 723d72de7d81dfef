"""What :func:`verify_api` can ask besides modules and callables: ONNX files and HTTP endpoints."""

from gradsigns_lightning.verification.api.queries import normalised
from gradsigns_lightning.oracles.http import HttpOracle, OracleError
from gradsigns_lightning.oracles.onnx import OnnxOracle
from gradsigns_lightning.oracles.protocols import JsonTemplate, MlflowProtocol, OpenInferenceProtocol, WireProtocol

__all__ = [
    "HttpOracle",
    "JsonTemplate",
    "MlflowProtocol",
    "OnnxOracle",
    "OpenInferenceProtocol",
    "OracleError",
    "WireProtocol",
    "normalised",
]
