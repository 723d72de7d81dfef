"""Targets for images and for a server's replies."""

import io
import json

import fuzz_mutation as plain
from fuzz_base import FOLDER, Reader, owned


def image():
    """An image in a folder, whose format follows from its content."""
    import numpy as np
    from PIL import Image

    from gradsigns_lightning.data.decoding import read_folder

    folder = FOLDER / "images"
    folder.mkdir()
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4
    seeds = []
    for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO", "EPS", "TGA", "PCX"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=form)
        seeds.append(file.getvalue())
    for mode, options in (
        ("L", {}),
        ("P", {}),
        ("1", {}),
        ("RGBA", {"format": "TIFF", "compression": "tiff_lzw"}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, **{"format": "PNG", **options})
        seeds.append(file.getvalue())
    Image.init()
    return Reader(
        lambda data: read_folder(str(folder), (3, 4, 5)),
        seeds,
        (folder / "a.png").write_bytes,
        pack=lambda value: b"",
    )


def reply_of(data):
    """Return status, headers and body from the fuzzer's input."""
    try:
        reply = json.loads(data)
        headers = {str(name): str(value) for name, value in reply["headers"].items()}
        body = (
            reply["body"].encode() if isinstance(reply["body"], str) else json.dumps(reply["body"]).encode()
        )
        return int(reply["status"]), headers, body
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return 200, {}, data


def server():
    """A server's reply, as {"status", "headers", "body"} or as the body alone."""
    import requests
    from urllib3 import HTTPResponse

    from gradsigns_lightning import verify_api
    from gradsigns_lightning.oracles import (
        HttpOracle,
        JsonTemplate,
        MlflowProtocol,
        OpenInferenceProtocol,
        OracleError,
    )

    key, images, _ = owned()
    url = "http://127.0.0.1:9/v2/models/m"
    protocols = (
        OpenInferenceProtocol,
        MlflowProtocol,
        lambda: JsonTemplate({"x": "$images"}, answer="/outputs"),
        lambda: JsonTemplate({"x": "$images"}, classes=["a", "b"]),
        lambda: JsonTemplate({"x": "$image"}, answer="/outputs/0/data"),
    )

    class Adapter(requests.adapters.BaseAdapter):
        """Hands out the reply without a socket."""

        def __init__(self):
            super().__init__()
            self.status, self.headers, self.body = 200, {}, b""

        def send(self, request, **_):
            raw = HTTPResponse(io.BytesIO(self.body), self.headers, self.status, preload_content=False)
            return requests.adapters.HTTPAdapter().build_response(request, raw)

        def close(self):
            pass

    adapter = Adapter()

    def write(data):
        adapter.status, adapter.headers, adapter.body = reply_of(data)

    def read(_):
        failed = None
        for protocol in protocols:
            oracle = HttpOracle(url, protocol(), retries=1, pause=0, longest_pause=0)
            oracle._session.mount("http://", adapter)
            try:
                verify_api(oracle, key, images, max_queries=20, batch_size=1)
            except (ValueError, OracleError) as error:
                failed = error
        if failed:
            raise failed

    tensor = {"name": "p", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.75]}
    bodies = [
        {"inputs": [tensor], "outputs": [tensor]},
        {"predictions": [[0.25, 0.75]]},
        [{"label": "a", "score": 0.5}, {"label": "b", "score": 0.25}],
        {"outputs": [1]},
        "a",
    ]
    seeds = [plain.to_json(body) for body in bodies]
    for status, headers in (
        (200, {"Content-Type": "text/html"}),
        (503, {"Retry-After": "1"}),
        (302, {"Location": "http://x"}),
    ):
        seeds.append(plain.to_json({"status": status, "headers": headers, "body": bodies[0]}))
    seeds.append(plain.to_json({"status": 200, "headers": {"Content-Encoding": "gzip"}, "body": bodies[0]}))
    return Reader(read, seeds, write, errors=(ValueError, OracleError))
