"""ONNX files, and HTTP endpoints scripted byte by byte; real servers are in tests/integration."""

import base64
import io
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from gradsigns_lightning import WatermarkKey, verify_api
from gradsigns_lightning.oracles import (
    HttpOracle,
    JsonTemplate,
    MlflowProtocol,
    OnnxOracle,
    OpenInferenceProtocol,
    OracleError,
    normalized,
)

SHAPE = (1, 4, 5)
IMAGES = (torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
SCORES = [[0.1, 0.9], [0.5, 0.5], [0.25, 0.75]]


class Script:
    """Sends its replies in turn, then repeats the last; a reply is (status, headers, body) or a function."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    def next(self):
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def serving(*replies):
    script = Script(*replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            script.requests.append((self.path, dict(self.headers), json.loads(body) if body else None))
            reply = script.next()
            if callable(reply):
                reply(self)
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield script, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ok(value) -> tuple:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def quick(url, protocol, **options):
    return HttpOracle(url, protocol, **{"pause": 0.01, "timeout": 2.0, "retries": 2, **options})


# --- Open Inference Protocol


def described(datatype="FP32"):
    return ok({"name": "net", "inputs": [{"name": "pixels", "datatype": datatype, "shape": [-1, 1, 4, 5]}]})


def inferred():
    hidden = {"name": "hidden", "shape": [3, 1], "datatype": "FP32", "data": [1, 2, 3]}
    return ok(
        {
            "outputs": [
                hidden,
                {"name": "scores", "shape": [3, 2], "datatype": "FP32", "data": np.ravel(SCORES).tolist()},
            ]
        }
    )


@pytest.mark.parametrize("suffix", ["", "/", "/infer"])
def test_open_inference_protocol(suffix):
    with serving(described(), inferred()) as (script, url):
        answer = quick(f"{url}/v2/models/net{suffix}", OpenInferenceProtocol(output="scores"))(IMAGES)
    assert np.array(answer).tolist() == SCORES
    assert [path for path, _, _ in script.requests] == ["/v2/models/net", "/v2/models/net/infer"]
    (tensor,) = script.requests[1][2]["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("pixels", "FP32", [3, 1, 4, 5])
    assert tensor["data"] == IMAGES.flatten().tolist()


def test_whole_numbers_for_models_that_take_them():
    with serving(described("UINT8"), inferred()) as (script, url):
        quick(f"{url}/v2/models/net", OpenInferenceProtocol("scores"))(IMAGES)
    assert script.requests[1][2]["inputs"][0]["data"] == (IMAGES * 255).round().int().flatten().tolist()


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([ok({})], "does not name exactly one input"),
        ([ok([1])], "does not name exactly one input"),
        ([described("BYTES")], "must be of datatype FP32, FP64 or UINT8, not BYTES"),
        ([described(), ok({"outputs": []})], "the reply has no output scores with scores"),
        (
            [described(), ok({"outputs": [{"name": "scores", "shape": [3, 3], "data": [1]}]})],
            "no output scores",
        ),
        (
            [described(), ok({"outputs": [{"name": "scores", "shape": [1], "data": ["x"]}]})],
            "no output scores",
        ),
    ],
)
def test_what_is_not_the_protocol_is_named(replies, message):
    with serving(*replies) as (_, url), pytest.raises(OracleError, match=message):
        quick(f"{url}/v2/models/net", OpenInferenceProtocol("scores"))(IMAGES)


# --- MLflow


@pytest.mark.parametrize("suffix", ["", "/invocations"])
def test_mlflow(suffix):
    with serving(ok({"predictions": SCORES})) as (script, url):
        assert quick(url + suffix, MlflowProtocol())(IMAGES) == SCORES
    assert script.requests[0][0] == "/invocations"
    assert script.requests[0][2] == {"inputs": IMAGES.tolist()}


@pytest.mark.parametrize("protocol", [OpenInferenceProtocol("scores"), MlflowProtocol()])
@pytest.mark.parametrize("ending", ["?token=a/b", "/?token=a/b"])
def test_an_address_keeps_its_query(protocol, ending):
    is_mlflow = isinstance(protocol, MlflowProtocol)
    replies = [ok({"predictions": SCORES})] if is_mlflow else [described(), inferred()]
    with serving(*replies) as (script, url):
        quick(f"{url}/net{ending}", protocol)(IMAGES)
    paths = ["/net/invocations"] if is_mlflow else ["/net", "/net/infer"]
    assert [path for path, _, _ in script.requests] == [f"{path}?token=a/b" for path in paths]


def test_what_is_not_mlflow_is_named():
    with serving(ok({"error": "no"})) as (_, url), pytest.raises(OracleError, match="no list `predictions`"):
        quick(url, MlflowProtocol())(IMAGES)


# --- any JSON service


@pytest.mark.parametrize("placeholder", ["$images", "$pixels", "$pngs"])
def test_a_template_for_batches(placeholder):
    protocol = JsonTemplate({"model": "net", "data": {"x": [placeholder]}}, answer="/result/0/scores")
    with serving(ok({"result": [{"scores": SCORES}]})) as (script, url):
        assert quick(f"{url}/predict?v=1", protocol)(IMAGES) == SCORES
    path, _, body = script.requests[0]
    assert (path, body["model"]) == ("/predict?v=1", "net")
    sent = body["data"]["x"][0]
    pixels = (IMAGES * 255).round().permute(0, 2, 3, 1).int()
    if placeholder == "$pngs":
        sent = [
            np.array(Image.open(io.BytesIO(base64.b64decode(file))))[:, :, None].tolist() for file in sent
        ]
    assert sent == (IMAGES.tolist() if placeholder == "$images" else pixels.tolist())


@pytest.mark.parametrize("placeholder", ["$image", "$png", "$jpeg"])
def test_a_template_for_single_images(placeholder):
    with serving(*map(ok, SCORES)) as (script, url):
        assert quick(url, JsonTemplate({"x": placeholder}))(IMAGES) == SCORES
    assert len(script.requests) == 3
    if placeholder == "$jpeg":
        assert base64.b64decode(script.requests[0][2]["x"])[:3] == b"\xff\xd8\xff"


CLASSES = ["cat", "dog", "cow"]


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ("dog", 1),
        (2, 2),
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ({"cow": 0.5, "cat": 0.2}, [0.2, np.nan, 0.5]),
        ([{"label": "cow", "score": 0.7}, {"label": "dog", "score": 0.2}], [np.nan, 0.2, 0.7]),
        ([{"class_name": "cat", "probability": 1.0}], [1.0, np.nan, np.nan]),
    ],
)
def test_rows_of_many_kinds(row, read):
    with serving(ok({"predictions": [row]})) as (_, url):
        (answer,) = quick(url, JsonTemplate({"x": "$images"}, "/predictions", CLASSES))(IMAGES[:1])
    assert np.array_equal(np.array(answer, dtype=float), np.array(read, dtype=float), equal_nan=True)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"predictions": [["x"], ["y"]]}, "must hold 1 answers at '/predictions'"),
        ({"prediction": []}, "nothing at '/predictions'"),
        (3, "nothing at '/predictions'"),
        ({"predictions": ["fox"]}, "answers 'fox', which is not one of the 3 `classes`"),
        ({"predictions": [[{"kind": "cat"}]]}, "an object in the reply has none of"),
    ],
)
def test_replies_that_do_not_fit_the_template_are_named(reply, message):
    with serving(ok(reply)) as (_, url), pytest.raises(OracleError, match=message):
        quick(url, JsonTemplate({"x": "$images"}, "/predictions", CLASSES))(IMAGES[:1])


def test_names_need_classes():
    with serving(ok([{"cat": 1}])) as (_, url), pytest.raises(OracleError, match="`classes` must list them"):
        quick(url, JsonTemplate("$images"))(IMAGES[:1])


@pytest.mark.parametrize("request_", [{"x": 1}, {"x": "$images", "y": "$image"}, "$Images", []])
def test_a_template_needs_one_placeholder(request_):
    with pytest.raises(ValueError, match="`request` must hold one of"):
        JsonTemplate(request_)


def test_an_answer_is_a_pointer():
    with pytest.raises(ValueError, match="`answer` must be a JSON pointer"):
        JsonTemplate("$images", answer="predictions")


# --- servers that break


GOOD = ok({"predictions": SCORES})


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_failures_are_repeated(status):
    with serving((status, {}, b"oops"), (status, {}, b""), GOOD) as (script, url):
        assert quick(url, MlflowProtocol())(IMAGES) == SCORES
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 413, 422])
def test_lasting_failures_end_at_once(status):
    reply = (status, {"Location": "http://127.0.0.1:9/elsewhere"}, b"secret of the server")
    with (
        serving(reply) as (script, url),
        pytest.raises(OracleError, match=f"refused the request with status {status}") as caught,
    ):
        quick(url, MlflowProtocol())(IMAGES)
    assert len(script.requests) == 1
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_describe_its_model_is_told_from_one_that_refuses_images():
    with (
        serving((501, {}, b"")) as (_, url),
        pytest.raises(OracleError, match=r"refused to describe its model \(GET\) with status 501"),
    ):
        quick(url, OpenInferenceProtocol())(IMAGES)


def test_failures_without_end_end():
    with (
        serving((500, {}, b"")) as (script, url),
        pytest.raises(OracleError, match="failed 3 times, at last with status 500"),
    ):
        quick(url, MlflowProtocol())(IMAGES)
    assert len(script.requests) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(as_date):
    header = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    with serving((429, {"Retry-After": header}, b""), GOOD) as (_, url):
        start = time.monotonic()
        assert quick(url, MlflowProtocol())(IMAGES) == SCORES
    assert time.monotonic() - start >= (0.5 if as_date else 1)


@pytest.mark.parametrize("header", ["nonsense", "-5", "1e400", ""])
def test_a_meaningless_retry_after_is_ignored(header):
    with serving((503, {"Retry-After": header}, b""), GOOD) as (_, url):
        assert quick(url, MlflowProtocol())(IMAGES) == SCORES


def test_a_server_that_asks_for_too_much_patience_ends_it():
    message = "status 429 and asks to wait 3600 s; try again later"
    with (
        serving((429, {"Retry-After": "3600"}, b"")) as (script, url),
        pytest.raises(OracleError, match=message),
    ):
        quick(url, MlflowProtocol())(IMAGES)
    assert len(script.requests) == 1


def hang_up(handler):
    handler.connection.close()


def say_nothing(handler):
    time.sleep(0.6)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(40):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("reply", "reason"), [(hang_up, "a broken connection"), (say_nothing, "a time-out"), (drip, "a time-out")]
)
def test_silence_is_a_failure(reply, reason):
    with serving(reply) as (_, url), pytest.raises(OracleError, match=f"at last with {reason}"):
        quick(url, MlflowProtocol(), timeout=0.3, retries=1)(IMAGES)


def test_a_reading_ends_when_its_time_is_over():
    with serving((503, {}, b""), GOOD) as (script, url):
        oracle = quick(url, MlflowProtocol(), pause=0.2, time_limit=0.1)
        with pytest.raises(
            OracleError,
            match=r"longer than `time_limit`, 0\.1 s; with a journal the reading can be continued",
        ):
            oracle(IMAGES)
        with pytest.raises(OracleError, match="longer than `time_limit`"):
            oracle(IMAGES)
    assert len(script.requests) == 1


def test_no_server_at_all():
    with serving(GOOD) as (_, url):
        pass
    with pytest.raises(OracleError, match="failed 2 times, at last with a broken connection"):
        quick(url, MlflowProtocol(), retries=1)(IMAGES)


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(80):
            handler.wfile.write(b" " * (1 << 20))
    except OSError:
        pass


def test_a_flood_is_refused():
    with serving(flood) as (_, url), pytest.raises(OracleError, match="larger than 64 MiB"):
        quick(url, MlflowProtocol(), timeout=20.0)(IMAGES)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"\xff", b"[" * 100_000, b"NaN", b'{"predictions": 1e999}', b'"predictions"']
)
def test_bodies_that_are_no_scores_are_named(body):
    with (
        serving((200, {}, body)) as (_, url),
        pytest.raises(OracleError, match="The endpoint's reply cannot be used"),
    ):
        quick(url, MlflowProtocol())(IMAGES)


def test_secrets_in_headers_and_addresses_stay_out_of_messages():
    with serving((401, {}, b"")) as (script, url):
        oracle = quick(
            url.replace("http://", "http://user:hunter2@"), MlflowProtocol(), headers={"X-Key": "hunter3"}
        )
        with pytest.raises(OracleError) as caught:
            oracle(IMAGES)
    assert script.requests[0][1]["X-Key"] == "hunter3"
    assert "hunter" not in f"{caught.value}{oracle!r}"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("ftp://x", {}, "`url` must start with http"),
        (3, {}, "`url` must start with http"),
        ("htps://me:secret@host/x?token=secret", {}, "got 'host/x'"),
        ("http://x", {"timeout": 0}, "`timeout` must be"),
        ("http://x", {"time_limit": 0}, "`time_limit` must be"),
        ("http://x", {"retries": -1}, "`retries` must be"),
        ("http://x", {"pause": -1}, "`pause` must be"),
    ],
)
def test_bad_arguments_are_named(url, options, message):
    with pytest.raises(ValueError, match=message):
        HttpOracle(url, MlflowProtocol(), **options)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=12), children, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_whatever_a_server_answers_the_error_is_clear(reply):
    """A protocol reads the reply or raises ValueError; verify_api accepts it or says what is wrong."""
    for protocol in (
        OpenInferenceProtocol(),
        MlflowProtocol(),
        JsonTemplate({"x": "$images"}),
        JsonTemplate({"x": "$images"}, "/predictions", CLASSES),
        JsonTemplate({"x": "$image"}, "", CLASSES),
    ):
        for body in (reply, {"predictions": reply}, {"outputs": [reply]}, [reply] * 3):
            n_images = 1 if isinstance(protocol, JsonTemplate) and not protocol.batched else 3
            try:
                scores = list(protocol.scores(body, n_images))
                key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=0, secret=bytes(32))
                verify_api(lambda x, scores=scores: scores[:1] * len(x), key, IMAGES, max_queries=10)
            except (ValueError, TypeError) as error:
                assert str(error)  # noqa: PT017


# --- ONNX


class Linear(nn.Module):
    def __init__(self, n_classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(20, n_classes)

    def forward(self, x):
        return self.layer(x.float().flatten(1))


def write_onnx(path, *, datatype=1, batch=None):
    """Write a linear classifier as an ONNX file, by hand, so that no exporter is needed."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    model = Linear()
    weight, bias = (p.detach().numpy() for p in model.layer.parameters())
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", datatype, [batch or "n", 1, 4, 5])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch or "n", 2])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(file)
    save(file, str(path))
    return model


@pytest.mark.parametrize("batch", [None, 1])
def test_an_onnx_file_answers_like_its_model(tmp_path, batch):
    model = write_onnx(tmp_path / "net.onnx", batch=batch)
    assert OnnxOracle(tmp_path / "net.onnx")(IMAGES) == pytest.approx(
        model(IMAGES).detach().numpy(), abs=1e-5
    )


def test_an_onnx_file_of_whole_numbers(tmp_path):
    model = write_onnx(tmp_path / "net.onnx", datatype=2)
    assert OnnxOracle(tmp_path / "net.onnx")(IMAGES) == pytest.approx(
        model(IMAGES * 255).detach().numpy(), abs=1e-3
    )


def test_an_oracle_of_normalized_images(tmp_path):
    model = write_onnx(tmp_path / "net.onnx")
    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=0, input_mean=0.5, input_std=0.25)
    answer = normalized(OnnxOracle(tmp_path / "net.onnx"), key)(IMAGES)
    assert answer == pytest.approx(model((IMAGES - 0.5) / 0.25).detach().numpy(), abs=1e-5)


def test_what_is_no_onnx_classifier_is_named(tmp_path):
    file = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="`path` must name an ONNX file"):
        OnnxOracle(file)
    write_onnx(file)
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="`path`"):
            OnnxOracle(file)
    write_onnx(file, datatype=11)  # double
    with pytest.raises(ValueError, match="must take one float32 or uint8 tensor"):
        OnnxOracle(file)


def edited(path, change):
    """Write the linear classifier with a change of its protobuf message."""
    import onnx

    write_onnx(path)
    model = onnx.load(str(path))
    change(model)
    path.write_bytes(model.SerializeToString())


def external(tensor, location="weights.bin"):
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location


def with_branch(model):
    """An operator whose subgraph, in an attribute, has a tensor elsewhere."""
    branch = model.graph.node.add(op_type="If", input=["c"], output=["z"]).attribute.add(
        name="then_branch", type=5
    )
    external(branch.g.node.add(op_type="Constant", output=["k"]).attribute.add(name="value", type=4).t)


def with_sparse(model):
    external(model.graph.sparse_initializer.add().values)


def with_function(model):
    function = model.functions.add(name="f", domain="own")
    external(function.node.add(op_type="Constant", output=["k"]).attribute.add(name="value", type=4).t)


def without_location(model):
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.bin"


OTHER_FILES = {
    "initializer": lambda model: external(model.graph.initializer[0]),
    "absolute": lambda model: external(model.graph.initializer[0], "/etc/passwd"),
    "memory address": lambda model: external(model.graph.initializer[0], "*/_ORT_MEM_ADDR_/*"),
    "subgraph": with_branch,
    "sparse": with_sparse,
    "function": with_function,
    "without the flag": without_location,
    "compiled context": lambda model: model.graph.node.add(
        op_type="EPContext", domain="com.microsoft", output=["z"]
    ),
}


@pytest.mark.parametrize("change", OTHER_FILES)
def test_an_onnx_file_that_names_other_files_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    edited(tmp_path / "net.onnx", OTHER_FILES[change])
    with pytest.raises(ValueError, match=r"`path`: the model in '.*net\.onnx' refers to other files"):
        OnnxOracle(tmp_path / "net.onnx")


def with_sparse_constant(model):
    constant = model.graph.node.add(op_type="Constant", output=["k"])
    constant.attribute.add(name="sparse_value", type=11).sparse_tensor.dims.append(5 * 10**8)


def with_cast_in_a_function(model):
    """The type of a cast to strings is an argument of the outer of two functions."""
    from onnx import helper

    with_functions(model, {"Inner": ["Identity"], "Outer": ["Inner"]}, "Outer")
    inner, outer = model.functions
    inner.attribute.append("inner_type")
    inner.node[0].op_type = "Cast"
    inner.node[0].attribute.add(name="to", type=2, ref_attr_name="inner_type")
    outer.attribute.append("type")
    outer.node[0].attribute.add(name="inner_type", type=2, ref_attr_name="type")
    model.graph.node[-1].attribute.append(helper.make_attribute("type", 8))


def with_cast(model):
    model.graph.node.add(op_type="Cast", input=["scores"], output=["k"]).attribute.add(name="to", type=2, i=8)


UNBOUNDED = {
    "initializer": (lambda model: model.graph.sparse_initializer.add().dims.append(5 * 10**8), "sparse"),
    "constant": (with_sparse_constant, "sparse"),
    "texts": (
        lambda model: model.graph.initializer.add(data_type=8, dims=[1]).string_data.append(b"0"),
        "numbers only",
    ),
    "text": (
        lambda model: model.graph.node.add(op_type="Constant", output=["k"]).attribute.add(
            name="value_string", type=3, s=b"0"
        ),
        "numbers only",
    ),
    "cast": (with_cast, "numbers only"),
    "cast in a function": (with_cast_in_a_function, "numbers only"),
}


@pytest.mark.parametrize("change", UNBOUNDED)
def test_sparse_tensors_and_texts_never_reach_the_runtime(tmp_path, monkeypatch, change):
    """The runtime makes sparse tensors dense while loading; they and strings are not in bounded memory."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was given the model")
    )
    edit, named = UNBOUNDED[change]
    edited(tmp_path / "net.onnx", edit)
    with pytest.raises(ValueError, match=rf"`path`: the model in '.*net\.onnx' must .*{named}"):
        OnnxOracle(tmp_path / "net.onnx")


def test_the_runtime_gets_the_checked_content_and_no_path(tmp_path, monkeypatch):
    import onnxruntime

    write_onnx(tmp_path / "net.onnx")
    # a field that nobody knows
    (tmp_path / "net.onnx").write_bytes((tmp_path / "net.onnx").read_bytes() + b"\xfa\x3f\x03abc")
    given, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda model, **rest: given.append(model) or session(model, **rest)
    )
    OnnxOracle(tmp_path / "net.onnx")(IMAGES)
    assert type(given[0]) is bytes
    assert b"abc" not in given[0]


def test_operators_of_unknown_domains_load_nothing(tmp_path):
    def change(model):
        model.graph.node[1].domain = "ai.onnx.contrib"
        model.opset_import.add(domain="ai.onnx.contrib", version=1)

    edited(tmp_path / "net.onnx", change)
    with pytest.raises(ValueError, match=r"`path`: .* not an ONNX model that can be run"):
        OnnxOracle(tmp_path / "net.onnx")


def test_other_formats_of_the_runtime_and_files_beyond_protobuf_are_refused(tmp_path):
    (tmp_path / "net.ort").write_bytes(b"\x18\x00\x00\x00ORTM" + bytes(100))
    with pytest.raises(ValueError, match=r"`path`: .* damaged"):
        OnnxOracle(tmp_path / "net.ort")
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(2**31)  # takes no place on the disk
    with pytest.raises(ValueError, match="`path` must name an ONNX file below 2 GiB"):
        OnnxOracle(tmp_path / "large.onnx")


def with_functions(model, bodies, called):
    """Pass the model's scores through a function of one input; a body names the operators that it calls."""
    from onnx import helper

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.opset_import.append(opsets[1])
    for name, body in bodies.items():
        nodes = [
            helper.make_node(part, [f"v{i}"], [f"v{i + 1}"], domain="" if part == "Identity" else "own")
            for i, part in enumerate(body)
        ]
        model.functions.append(helper.make_function("own", name, ["v0"], [f"v{len(body)}"], nodes, opsets))
    model.graph.node[2].output[0] = "before"
    model.graph.node.append(helper.make_node(called, ["before"], ["scores"], domain="own"))


def doubling(n):
    return {"F0": ["Identity"]} | {f"F{i}": [f"F{i - 1}"] * 2 for i in range(1, n + 1)}


def test_an_onnx_file_with_functions_answers_like_its_model(tmp_path):
    edited(tmp_path / "net.onnx", lambda model: with_functions(model, doubling(5), "F5"))
    assert OnnxOracle(tmp_path / "net.onnx")(IMAGES) == pytest.approx(
        Linear()(IMAGES).detach().numpy(), abs=1e-5
    )


def with_large_function(model):
    """Few nodes, each of which would get its own copy of a tensor."""
    with_functions(model, doubling(12), "F12")
    model.functions[0].node.add(op_type="Constant", output=["k"]).attribute.add(
        name="value", type=4
    ).t.raw_data = bytes(1 << 17)


def with_large_attribute(model):
    """As above, but the tensor is an argument of the outermost call."""
    with_functions(model, doubling(12), "F12")
    model.graph.node[-1].attribute.add(name="value", type=4).t.raw_data = bytes(1 << 17)


def with_graph_attribute(model):
    with_functions(model, doubling(2), "F2")
    model.graph.node[-1].attribute.add(name="branch", type=5).g.node.add(op_type="Constant", output=["k"])


def with_large_default(model):
    with_functions(model, doubling(12), "F12")
    model.functions[12].attribute_proto.add(name="value", type=4).t.raw_data = bytes(1 << 17)


def with_calls_in_a_branch(model):
    with_functions(model, {**doubling(18), "Outer": ["Identity"]}, "Outer")
    branch = (
        model.functions[-1]
        .node.add(op_type="If", input=["c"], output=["z"])
        .attribute.add(name="then_branch", type=5)
    )
    for _ in range(3):
        branch.g.node.add(op_type="F18", domain="own", input=["v0"], output=["k"])


GROWING = {
    "calls": lambda model: with_functions(model, doubling(25), "F25"),
    "more than can be counted": lambda model: with_functions(model, doubling(3000), "F3000"),
    "itself": lambda model: with_functions(model, {"F": ["F"]}, "F"),
    "each other": lambda model: with_functions(model, {"F": ["G"], "G": ["F"]}, "F"),
    "tensors": with_large_function,
    "arguments": with_large_attribute,
    "graphs as arguments": with_graph_attribute,
    "defaults": with_large_default,
    "calls in a branch": with_calls_in_a_branch,
}


@pytest.mark.parametrize("change", GROWING)
def test_functions_that_would_grow_beyond_bounds_never_reach_the_runtime(tmp_path, monkeypatch, change):
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was given the model")
    )
    edited(tmp_path / "net.onnx", GROWING[change])
    with pytest.raises(
        ValueError,
        match=r"`path`: the functions of the model in '.*net\.onnx' must not call "
        r"themselves",
    ):
        OnnxOracle(tmp_path / "net.onnx")


def test_a_single_number_is_no_row_of_scores(tmp_path):
    def change(model):
        model.graph.node[2].output[0] = "before"
        model.graph.node.add(op_type="ReduceSum", input=["before"], output=["scores"]).attribute.add(
            name="keepdims", type=2, i=0
        )
        model.graph.output[0].type.tensor_type.ClearField("shape")

    edited(tmp_path / "net.onnx", change)
    with pytest.raises(ValueError, match="must return a row of scores for each image, got a single number"):
        OnnxOracle(tmp_path / "net.onnx")(IMAGES)


GREEDY = """
import re, torch
from pathlib import Path
from gradsigns_lightning.oracles import OnnxOracle, onnx

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

onnx._MOST_MEMORY = 1 << 28
OnnxOracle("net.onnx")(torch.rand(3, 1, 4, 5))
before = most()
oracle = OnnxOracle("greedy.onnx")
print(most() - before)
try:
    oracle(torch.rand(3, 1, 4, 5))
except ValueError as error:
    print(most() - before, error)
"""


@pytest.mark.parametrize("kind", ["filled", "doubled"])
def test_an_onnx_graph_gets_bounded_memory(tmp_path, kind):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    def change(model):
        graph, n_values = model.graph, 1 << 28  # a gibibyte of float32
        last = graph.node[-1].output[0]
        graph.node[-1].output[0] = "linear"
        if kind == "filled":
            graph.initializer.append(numpy_helper.from_array(np.array([n_values]), "shape"))
            one = numpy_helper.from_array(np.ones(1, np.float32), "one")
            graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["large"], value=one))
        else:
            graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "c0"))
            names = [*(f"c{i}" for i in range(28)), "large"]
            graph.node.extend(helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names))
        graph.node.append(helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0))
        graph.node.append(helper.make_node("Add", ["linear", "sum"], [last]))

    write_onnx(tmp_path / "net.onnx")
    model = onnx.load(str(tmp_path / "net.onnx"))
    change(model)
    onnx.save(model, str(tmp_path / "greedy.onnx"))
    done = subprocess.run(
        [sys.executable, "-c", GREEDY], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
    )
    loaded, ran = done.stdout.splitlines()
    assert int(loaded) < 50  # MiB
    assert int(ran.split()[0]) < 400
    assert "the ONNX model cannot be run on images" in ran
