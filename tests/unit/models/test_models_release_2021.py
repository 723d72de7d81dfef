"""The authors' released files; the real ones where GRADSIGNS_2021 names their folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gradsigns_lightning import verify, verify_api
from gradsigns_lightning.models.release_2021 import load_2021

h5py = pytest.importorskip("h5py")


def write_release(folder: Path, seed=0, n_carriers=40, n_bits=16) -> dict[str, np.ndarray]:
    """Write a release of the authors' layout with random weights; return the Keras weights by name."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(3072)
    mask[generator.choice(3072, n_carriers, replace=False)] = 1
    np.save(folder / "grad_select.npy", mask)
    np.save(folder / "embed_key.npy", generator.uniform(-1, 1, (n_bits, n_carriers)))
    np.save(folder / "wm.npy", generator.integers(0, 2, n_bits))
    shapes = {}
    widths = [3, *[16] * 7, *[32] * 7, *[64] * 7]
    plan = [(3, 16, 3)]
    for block in range(9):
        width, inputs = (16, 32, 64)[block // 3], (16, 16, 16, 16, 32, 32, 32, 64, 64)[block]
        plan += [(inputs, width, 3), (width, width, 3)]
        if block in (3, 6):
            plan.append((inputs, width, 1))
    assert widths[0] == 3
    for i, (inputs, width, size) in enumerate(plan, 1):
        shapes[f"conv2d_{i}/kernel"] = (size, size, inputs, width)
        shapes[f"conv2d_{i}/bias"] = (width,)
    for i, width in enumerate([16] * 7 + [32] * 6 + [64] * 6, 1):
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"batch_normalization_{i}/{name}"] = (width,)
    shapes |= {"dense_1/kernel": (64, 10), "dense_1/bias": (10,)}
    weights = {name: generator.normal(0, 0.1, shape).astype("f4") for name, shape in shapes.items()}
    for name in weights:
        if name.endswith("variance"):
            weights[name] = np.abs(weights[name]) + 0.5
    with h5py.File(folder / "model.hdf5", "w") as file:
        for name, values in weights.items():
            layer, parameter = name.split("/")
            file.create_dataset(f"model_weights/{layer}/{layer}/{parameter}:0", data=values)
        file.create_group("model_weights/activation_1")
    return weights


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path)
    return tmp_path


def test_arrays_come_back_in_the_order_of_the_torch_image(release):
    key, _ = load_2021(release)
    mask = np.load(release / "grad_select.npy").reshape(32, 32, 3)
    image = np.zeros(3072)
    image[key.carriers] = 1
    assert np.array_equal(image.reshape(3, 32, 32), mask.transpose(2, 0, 1))
    # The projection of a gradient is the same in both orders.
    gradient = np.random.default_rng(5).normal(size=(32, 32, 3))
    theirs = np.load(release / "embed_key.npy") @ gradient.reshape(-1)[mask.reshape(-1) == 1]
    ours = key.projection.double().numpy() @ gradient.transpose(2, 0, 1).reshape(-1)[key.carriers.numpy()]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert key.signature.tolist() == np.load(release / "wm.npy").tolist()
    assert (key.n_bits, key.n_carriers, key.target_class) == (16, 40, 0)


def test_weights_come_back_in_the_layout_of_torch(tmp_path):
    weights = write_release(tmp_path)
    _, model = load_2021(tmp_path, mean_image=torch.zeros(3, 32, 32))
    network = model.network
    assert np.array_equal(network.stem[0].weight.detach(), weights["conv2d_1/kernel"].transpose(3, 2, 0, 1))
    assert np.array_equal(network.head.weight.detach(), weights["dense_1/kernel"].T)
    assert np.array_equal(network.blocks[3].shortcut.bias.detach(), weights["conv2d_10/bias"])
    assert np.array_equal(
        network.blocks[8].residual[4].running_var, weights["batch_normalization_19/moving_variance"]
    )
    assert network.blocks[8].residual[4].momentum == 0.01  # Keras, whose 0.99 is the share of what was before
    assert not model.training
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_mean_image_is_subtracted(release):
    mean = torch.rand(3, 32, 32)
    x = torch.rand(2, 3, 32, 32)
    _, model = load_2021(release, mean_image=mean)
    _, plain = load_2021(release, mean_image=torch.zeros(3, 32, 32))
    assert torch.allclose(model(x), plain(x - mean), atol=1e-6)


def test_the_readers_take_the_released_key(release):
    key, model = load_2021(release)
    images = torch.rand(50, 3, 32, 32)
    with pytest.warns(UserWarning, match="The model classifies only"):
        result = verify(model, key, images)
    assert result.n_bits == 16
    assert result.commitment == key.commitment
    assert verify_api(model, key, images, max_queries=100).verdict in ("not_proven", "inconclusive")
    assert "commitment" not in repr(key)


@pytest.mark.parametrize("name", ["embed_key.npy", "grad_select.npy", "wm.npy", "model.hdf5"])
def test_missing_and_damaged_files_are_named(release, name):
    content = (release / name).read_bytes()
    for damaged in (None, b"", content[: len(content) // 2], b"PK\x03\x04" + content):
        (release / name).unlink(missing_ok=True)
        if damaged is not None:
            (release / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="`folder`"):
            load_2021(release)


def test_pickles_are_not_run(release):
    np.save(release / "wm.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="`folder`"):
        load_2021(release)


def test_arrays_that_do_not_fit_are_named(release):
    np.save(release / "wm.npy", np.zeros(15))
    with pytest.raises(ValueError, match=r"`folder`: the arrays .* do not fit together"):
        load_2021(release)


def test_a_model_of_another_shape_is_named(release):
    with h5py.File(release / "model.hdf5", "a") as file:
        del file["model_weights/dense_1/dense_1/kernel:0"]
    with pytest.raises(ValueError, match="`folder`"):
        load_2021(release)


WEIGHT = "model_weights/dense_1/dense_1/kernel:0"
VALUES = np.zeros((64, 10), "f4")


def replaced(release, make):
    with h5py.File(release / "model.hdf5", "a") as file:
        file["elsewhere"] = VALUES
        del file[WEIGHT]
        make(file)


def a_virtual_weight(file):
    layout = h5py.VirtualLayout((64, 10), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "elsewhere", (64, 10))
    file.create_virtual_dataset(WEIGHT, layout)


def an_external_layer(file):
    del file["model_weights/dense_1"]
    file["model_weights/dense_1"] = h5py.ExternalLink("other.h5", "model_weights/dense_1")


ELSEWHERE = {
    "external link": lambda file: file.__setitem__(WEIGHT, h5py.ExternalLink("other.h5", "elsewhere")),
    "external layer": an_external_layer,
    "soft link": lambda file: file.__setitem__(WEIGHT, h5py.SoftLink("/elsewhere")),
    "external data": lambda file: file.create_dataset(
        WEIGHT, (64, 10), "f4", external=[("other.bin", 0, 2560)]
    ),
    "virtual": a_virtual_weight,
    "packed": lambda file: file.create_dataset(WEIGHT, data=VALUES, compression="gzip"),
    "chunks": lambda file: file.create_dataset(WEIGHT, data=VALUES, chunks=(64, 10)),
    "text": lambda file: file.create_dataset(WEIGHT, data=np.full((64, 10), b"abc")),
    "objects": lambda file: file.create_dataset(WEIGHT, (64, 10), h5py.string_dtype()),
    "group": lambda file: file.create_group(WEIGHT),
    "huge": lambda file: file.create_dataset(WEIGHT, (10**6, 10**6), "f4"),
    "scalar": lambda file: file.create_dataset(WEIGHT, data=1.0),
    "layer is a dataset": lambda file: (
        file.__delitem__("model_weights/dense_1"),
        file.create_dataset("model_weights/dense_1", data=1.0),
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_only_plain_weights_of_the_file_itself_are_read(release, monkeypatch, name):
    monkeypatch.chdir(release)
    (release / "other.bin").write_bytes(bytes(2560))
    with h5py.File("other.h5", "w") as file:
        file["elsewhere"] = file[WEIGHT] = VALUES
        file["model_weights/dense_1/dense_1/bias:0"] = VALUES[0]
    replaced(release, ELSEWHERE[name])
    with pytest.raises(ValueError, match=r"`folder`: (the Keras model has no|weight) "):
        load_2021(release)


@pytest.mark.parametrize("name", ["embed_key.npy", "grad_select.npy", "wm.npy"])
def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(release, name):
    content = (release / name).read_bytes()
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**12},), }}".ljust(117).encode() + b"\n"
    (release / name).write_bytes(content[:8] + len(header).to_bytes(2, "little") + header + content[128:])
    with pytest.raises(
        ValueError,
        match=r"`folder` must hold the authors' released arrays; .* is missing or "
        r"damaged",
    ):
        load_2021(release)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("grad_select.npy", np.full(3072, 40 / 3072)),
        ("grad_select.npy", np.full(3072, np.nan)),
        ("grad_select.npy", np.zeros(3072)),
        ("wm.npy", np.full(16, 2)),
        ("wm.npy", np.zeros((4, 4))),
        ("wm.npy", np.zeros(0)),
        ("embed_key.npy", np.full((16, 40), np.inf)),
        ("embed_key.npy", np.zeros((16, 40), complex)),
        ("embed_key.npy", np.zeros((16, 40), [("a", "f4")])),
        ("embed_key.npy", np.zeros((1, 16, 40))),
    ],
)
def test_other_arrays_are_named(release, name, array):
    np.save(release / name, array)
    with pytest.raises(ValueError, match="`folder`"):
        load_2021(release)


@pytest.mark.parametrize(
    ("mean", "error"),
    [(torch.zeros(3), ValueError), (torch.zeros(3, 32, 32, dtype=torch.uint8), ValueError), (0.5, TypeError)],
)
def test_a_wrong_mean_image_is_named(release, mean, error):
    with pytest.raises(error, match="`mean_image` must be"):
        load_2021(release, mean_image=mean)


# --- the real release


@pytest.mark.skipif(
    "GRADSIGNS_2021" not in os.environ, reason="GRADSIGNS_2021 does not name the authors' released folder"
)
def test_the_released_model_has_the_shape_of_its_readme():
    key, model = load_2021(os.environ["GRADSIGNS_2021"])
    assert (key.n_bits, key.n_carriers) == (64, 384)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_the_command_reads_weights_and_probabilities(release, tmp_path, capsys):
    from PIL import Image

    from gradsigns_lightning.cli import main

    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    np.save(tmp_path / "mean.npy", np.full((3, 32, 32), 0.5))
    words = [
        "import-2021",
        f"folder={release}",
        f"images={folder}",
        "api.max_queries=60",
        f"json={tmp_path / 'found.json'}",
    ]
    assert main([*words, f"mean_image={tmp_path / 'mean.npy'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["white_box"]["n_bits"], found["white_box"]["n_queries"]) == (16, 9)
    assert 0 < found["black_box"]["n_queries"] <= 60
    assert {part["verdict"] for part in found.values()} <= {"not_proven", "inconclusive"}
    for path in (tmp_path / "nowhere.npy", release / "model.hdf5"):
        assert main([*words, f"mean_image={path}"]) == 1
        assert "`mean_image` must name a .npy file" in capsys.readouterr().err
