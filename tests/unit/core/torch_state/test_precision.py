"""A pass computes in full float32 and restores the user's settings."""

import pytest
import torch
from torch import nn

from gradsigns_lightning.core.torch_state.precision import (
    default_dtype,
    full_float32,
    in_full_precision,
    widest_float,
)


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_tf32_is_off_inside_and_as_before_afterwards(setting):
    torch.set_float32_matmul_precision(setting)
    try:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        with pytest.raises(ZeroDivisionError):
            _fail_without_tf32()
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


@full_float32()
def _fail_without_tf32():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    else:
        assert not torch.backends.cuda.matmul.allow_tf32
    raise ZeroDivisionError


def test_the_default_dtype_comes_back():
    with pytest.raises(KeyError), default_dtype(torch.float64):
        raise KeyError(torch.ones(1).dtype)
    assert torch.ones(1).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_without_half_precision_is_called_as_it_is(dtype):
    model = nn.Linear(2, 2).to(dtype)
    assert in_full_precision(model, model) == (model, dtype)


def test_one_half_precision_layer_is_computed_in_float32():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    function, dtype = in_full_precision(model, model)
    assert dtype == torch.float32
    expected = (
        model[1].weight.float() @ (model[0].weight @ torch.ones(2) + model[0].bias) + model[1].bias.float()
    )
    torch.testing.assert_close(function(torch.ones(1, 2))[0], expected)
    assert model[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "widest"), [("mps", torch.float32), ("cpu", torch.float64), ("cuda", torch.float64)]
)
def test_the_widest_float_is_one_that_the_device_has(device, widest):
    assert widest_float(torch.device(device)) == widest
