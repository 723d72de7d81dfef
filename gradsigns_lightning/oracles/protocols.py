"""Wire protocols: how images become a request, and how a reply becomes scores."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.verification.images import pixels_of

Json = Any
_LABEL_NAMES = ("label", "class", "class_name", "name", "category")
_SCORE_NAMES = ("score", "probability", "confidence", "prob", "value")


class WireProtocol(Protocol):
    """Builds requests and reads replies; see :class:`HttpOracle`."""

    @property
    def batched(self) -> bool:
        """Whether one request holds several images."""
        ...

    def address(self, url: str) -> str:
        """Return where requests go for the endpoint ``url``."""
        ...

    def prepare(self, url: str, get: Callable[[str], Json]) -> None:
        """Fetch what must be known before the first request; ``get`` returns the JSON at an address."""
        ...

    def request(self, images: Tensor) -> Json:
        """Return the body for images ``(n, C, H, W)``, float32."""
        ...

    def scores(self, reply: Json, n_images: int) -> Json:
        """Return scores or labels, one for each image.

        Raises:
            ValueError: the reply does not hold them.
        """
        ...


class OpenInferenceProtocol:
    """Speaks the Open Inference Protocol V2 of KServe, Triton and MLServer, over JSON.

    The endpoint is the model's address, ``http://host/v2/models/NAME``, optionally with ``/versions/V`` or
    ``/infer``.

    Args:
        output: name of the output that holds the scores; the first by default.
    """

    batched = True

    def __init__(self, output: str | None = None) -> None:
        self._output = output
        self._name, self._datatype = "", ""

    def address(self, url: str) -> str:
        return _with_suffix(url, "/infer")

    def prepare(self, url: str, get: Callable[[str], Json]) -> None:
        try:
            (described,) = get(_with_suffix(url, "/infer", ""))["inputs"]
            self._name, self._datatype = str(described["name"]), str(described["datatype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("the model's description does not name exactly one input") from error
        if self._datatype not in ("FP32", "FP64", "UINT8"):
            raise ValueError(
                f"the model's input must be of datatype FP32, FP64 or UINT8, not "
                f"{printable(self._datatype, limit=40)}"
            )

    def request(self, images: Tensor) -> Json:
        values = pixels_of(images) if self._datatype == "UINT8" else images
        tensor = {
            "name": self._name,
            "shape": list(images.shape),
            "datatype": self._datatype,
            "data": values.flatten().tolist(),
        }
        return {"inputs": [tensor]}

    def scores(self, reply: Json, n_images: int) -> Json:
        try:
            outputs = [tensor for tensor in reply["outputs"] if self._output in (None, tensor["name"])]
            return np.asarray(outputs[0]["data"], dtype=np.float64).reshape(
                [int(size) for size in outputs[0]["shape"]]
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the reply has no output {self._output or ''} with scores") from error


class MlflowProtocol:
    """Speaks to MLflow's scoring server: images as nested lists ``(n, C, H, W)`` under ``inputs``.

    The endpoint is the server's address, with or without ``/invocations``.
    """

    batched = True

    def address(self, url: str) -> str:
        return _with_suffix(url, "/invocations")

    def prepare(self, url: str, get: Callable[[str], Json]) -> None:
        """Need nothing."""

    def request(self, images: Tensor) -> Json:
        return {"inputs": images.tolist()}

    def scores(self, reply: Json, n_images: int) -> Json:
        predictions = reply.get("predictions") if isinstance(reply, dict) else None
        if not isinstance(predictions, list):
            raise ValueError("the reply has no list `predictions`")
        return predictions


class JsonTemplate:
    """Speaks to any JSON service, given an example of its request and the place of the scores in its reply.

    For a single image, the reply's answer is a list of scores, a label, an object that maps names to scores,
    or a list of objects with a label and a score each; for several images, a list of these. Classes that the
    service leaves out get NaN.

    Args:
        request: the body; in it ``"$images"`` stands for all images as nested lists ``(n, C, H, W)`` of
            floats, ``"$pixels"`` for ``(n, H, W, C)`` of integers, ``"$pngs"`` for a list of PNG files in
            base64. ``"$image"``, ``"$png"`` and ``"$jpeg"`` (quality 100) stand for a single image; then
            every image gets a request of its own.
        answer: JSON pointer (RFC 6901) to the answer in the reply, for example ``"/predictions"``; empty if
            the answer is the whole reply.
        classes: names of all classes in the order of the model's outputs, if the service answers with names.

    Raises:
        ValueError: the request has not exactly one placeholder.
    """

    def __init__(self, request: Json, answer: str = "", classes: Sequence[str] | None = None) -> None:
        found = [value for value in _leaves(request) if value in _PLACEHOLDERS]
        if len(found) != 1:
            raise ValueError(f"`request` must hold one of {sorted(_PLACEHOLDERS)}, got {len(found)} of them.")
        if answer and not answer.startswith("/"):
            raise ValueError(f"`answer` must be a JSON pointer such as '/predictions', got {answer!r}.")
        self._request, self._answer = request, answer
        self._placeholder = found[0]
        self._classes = {str(name): index for index, name in enumerate(classes or ())}

    @property
    def batched(self) -> bool:
        return self._placeholder.endswith("s")

    def address(self, url: str) -> str:
        return url

    def prepare(self, url: str, get: Callable[[str], Json]) -> None:
        """Need nothing."""

    def request(self, images: Tensor) -> Json:
        return _filled(self._request, self._placeholder, _PLACEHOLDERS[self._placeholder](images))

    def scores(self, reply: Json, n_images: int) -> Json:
        found = _at(reply, self._answer)
        rows = found if self.batched else [found]
        if not isinstance(rows, list) or len(rows) != n_images:
            raise ValueError(f"the reply must hold {n_images} answers at {str(self._answer)!r}")
        return [self._row(row) for row in rows]

    def _row(self, row: Json) -> Json:
        """Return a label as its number, or scores in the order of the classes."""
        if isinstance(row, str):
            return self._index(row)
        if isinstance(row, Mapping):
            return self._by_class(row)
        if isinstance(row, list) and row and all(isinstance(entry, Mapping) for entry in row):
            return self._by_class({_first(entry, _LABEL_NAMES): _first(entry, _SCORE_NAMES) for entry in row})
        return row

    def _by_class(self, named: Mapping[Any, Any]) -> list[Any]:
        if not self._classes:
            raise ValueError(
                "the service answers with names: `classes` must list them in the order of the model's outputs"
            )
        scores = [math.nan] * len(self._classes)
        for name, score in named.items():
            scores[self._index(name)] = score
        return scores

    def _index(self, name: Any) -> int:
        if str(name) not in self._classes:
            raise ValueError(
                f"the service answers {str(name)[:40]!r}, which is not one of the {len(self._classes)} "
                "`classes`"
            )
        return self._classes[str(name)]


def _with_suffix(url: str, suffix: str, instead: str | None = None) -> str:
    """Return an address whose path ends with ``suffix``, or with ``instead`` in its place; keeps a query."""
    address, mark, query = url.partition("?")
    return address.rstrip("/").removesuffix(suffix) + (suffix if instead is None else instead) + mark + query


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in entry:
            return entry[name]
    raise ValueError(f"an object in the reply has none of {list(names)}")


def _leaves(value: Json) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for child in value.values() for leaf in _leaves(child)]
    if isinstance(value, list):
        return [leaf for child in value for leaf in _leaves(child)]
    return [value] if isinstance(value, str) else []


def _filled(value: Json, placeholder: str, content: Json) -> Json:
    if isinstance(value, Mapping):
        return {name: _filled(child, placeholder, content) for name, child in value.items()}
    if isinstance(value, list):
        return [_filled(child, placeholder, content) for child in value]
    return content if value == placeholder else value


def _at(value: Json, pointer: str) -> Json:
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"the reply has nothing at {str(pointer)!r}") from error
    return value


def _as_files(images: Tensor, kind: str) -> list[str]:
    pillow = require("PIL.Image", extra="http")
    arrays = pixels_of(images).permute(0, 2, 3, 1).numpy()
    # a lower quality would erase the probes
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    files = []
    for array in arrays:
        file = io.BytesIO()
        pillow.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(
            file, format=kind, **options
        )
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


_PLACEHOLDERS: dict[str, Callable[[Tensor], Json]] = {
    "$images": lambda images: images.tolist(),
    "$pixels": lambda images: pixels_of(images).permute(0, 2, 3, 1).tolist(),
    "$pngs": lambda images: _as_files(images, "PNG"),
    "$image": lambda images: images[0].tolist(),
    "$png": lambda images: _as_files(images, "PNG")[0],
    "$jpeg": lambda images: _as_files(images, "JPEG")[0],
}
