"""Compiled networks are signed through their uncompiled originals; the task itself runs compiled."""

import pytest
import torch
from signed_digits import (
    Net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    val_loader,
)

from gradsigns_lightning import verify

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.filterwarnings("ignore")]


def compiled_child(backend):
    model = Net()
    model.net = torch.compile(model.net, backend=backend)
    return model, model


def compiled_in_place(backend):
    model = Net()
    model.net[1].compile(backend=backend)
    return model, model


def compiled_root(backend):
    model = Net()
    model.compile(backend=backend)
    return model, model


def compiled_lightning_module(backend):
    model = Net()
    return torch.compile(model, backend=backend), model


@pytest.mark.parametrize("engine", ["auto", "forward_over_reverse"])
@pytest.mark.parametrize(
    "make", [compiled_child, compiled_in_place, compiled_root, compiled_lightning_module]
)
def test_compiled_networks_are_signed(make, engine):
    calls = []

    def backend(graph, inputs):
        # Stands for any backend without second derivatives: what it returns is used for the task only.
        def run(*args):
            calls.append(torch.is_grad_enabled())
            return graph.forward(*args)

        return run

    torch.compiler.reset()
    fitted, model = make(backend)
    key = make_key(8)
    trainer = make_trainer(make_mark(key, engine=engine), max_epochs=5)
    trainer.fit(fitted, train_loader(600), val_loader())
    assert calls
    assert float(trainer.callback_metrics["wm/ber"]) == 0
    assert verify(model, key, held_out_target_images()).bit_error_rate == 0


def test_ahead_of_time_autograd_which_has_no_second_derivative():
    torch.compiler.reset()
    _, model = compiled_child("aot_eager")
    key = make_key(8)
    make_trainer(make_mark(key), max_epochs=5).fit(model, train_loader(600))
    assert verify(model, key, held_out_target_images()).bit_error_rate == 0
