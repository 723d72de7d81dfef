"""The dose follows the task: a strength means the same whatever the loss is multiplied by."""

import math

import pytest
import torch
from lightning.fabric import Fabric
from signed_digits import Net, held_out_target_images, make_key, make_trainer, mlp, train_loader, val_set
from torch.nn import functional as F

from gradsigns_lightning import FabricGradSigns, GradSigns, verify

pytestmark = pytest.mark.usefixtures("seeded")
SCALES = [0.01, 0.1, 32.0, 128.0]


class Scaled(Net):
    """Multiplies its loss, and divides the rate of plain SGD by the same factor.

    So the twin's training stays the same.
    """

    def __init__(self, scale, optimizer):
        super().__init__()
        self.scale, self.kind = scale, optimizer

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        if self.kind == "adam":
            return torch.optim.Adam(self.parameters(), lr=3e-3, eps=1e-8 * self.scale)
        return torch.optim.SGD(self.parameters(), lr=0.1 / self.scale, momentum=0.9)


def fitted(scale, optimizer, **settings):
    torch.manual_seed(2)
    model = Scaled(scale, optimizer)
    make_trainer(GradSigns(make_key()), max_epochs=6, **settings).fit(model, train_loader())
    return model


def accuracy(model):
    images, labels = val_set().tensors
    return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_mark_and_accuracy_are_the_same_at_every_scale_of_the_loss(optimizer):
    plain = fitted(1.0, optimizer)
    read = verify(plain, make_key(), held_out_target_images())
    assert read.bit_error_rate == 0
    for scale in SCALES:
        scaled = fitted(scale, optimizer)
        again = verify(scaled, make_key(), held_out_target_images())
        assert again.n_matches == read.n_matches
        assert again.margin == pytest.approx(read.margin, abs=0.1)
        assert accuracy(scaled) == pytest.approx(accuracy(plain), abs=0.01)


def test_clipping_and_accumulation_keep_the_mark():
    model = fitted(1.0, "adam", gradient_clip_val=0.1, accumulate_grad_batches=2)
    assert verify(model, make_key(), held_out_target_images()).bit_error_rate <= 1 / 32


def test_strength_is_the_ratio_of_the_gradients_lengths():
    lengths = []

    class Watch(GradSigns):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            lengths.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))

    make_trainer(Watch(make_key(), strength=50.0, cadence=1000), max_steps=8).fit(
        Scaled(3.0, "sgd"), train_loader()
    )
    task, embedded = lengths[0], lengths[1]
    assert embedded == pytest.approx(math.hypot(50 * task, task), rel=0.1)
    assert max(lengths[2:]) < 20 * task


def test_a_step_that_no_optimizer_makes_does_not_count_as_embedded():
    # Lightning's documentation shows this way to step an optimizer every second batch; the closure alone
    # counts as a step.
    class EverySecond(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    made = []

    class Watch(GradSigns):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            made.append(trainer.global_step)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.watermarker.state.last_step == trainer.global_step - 1:
                embedded.append(self.watermarker.state.last_step)

    embedded, model, mark = [], EverySecond(), Watch(make_key(), cadence=2)
    make_trainer(mark, max_epochs=8).fit(model, train_loader())
    assert len(set(made) & set(embedded)) == mark.watermarker.state.n_embedded > 50
    assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0


def last_layer_only(*, frozen):
    net = mlp()
    net[1].requires_grad_(not frozen)
    return net, torch.optim.SGD(net[4].parameters(), 0.1, momentum=0.9)


def same_weights(one, other):
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_parameters_without_an_optimizer_count_as_frozen():
    class LastLayer(Net):
        def __init__(self, frozen):
            torch.manual_seed(4)
            net, self.own = last_layer_only(frozen=frozen)
            super().__init__(net)

        def configure_optimizers(self):
            return self.own

    models = [LastLayer(frozen) for frozen in (True, False)]
    for model in models:
        make_trainer(GradSigns(make_key()), max_epochs=2).fit(model, train_loader(shuffle=False))
    assert same_weights(*models)
    assert all(p.requires_grad for p in models[1].parameters())


def test_parameters_without_an_optimizer_in_a_fabric_loop_count_as_frozen():
    nets = []
    for frozen in (True, False):
        torch.manual_seed(4)
        net, optimizer = last_layer_only(frozen=frozen)
        watermark = FabricGradSigns(Fabric(accelerator="cpu", devices=1), make_key())
        for step, (images, labels) in enumerate(train_loader(shuffle=False)):
            optimizer.zero_grad()
            (F.cross_entropy(net(images), labels) + watermark.loss(net, images, labels, step=step)).backward()
            optimizer.step()
        assert watermark.watermarker.state.n_embedded > 5
        nets.append(net)
    assert same_weights(*nets)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_fabric_loop_with_a_scaled_loss_is_signed(scale):
    fabric, key = Fabric(accelerator="cpu", devices=1), make_key()
    net = mlp()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1 / scale, momentum=0.9))
    watermark, step = FabricGradSigns(fabric, key), 0
    for epoch in range(6):
        for images, labels in fabric.setup_dataloaders(train_loader()):
            loss = scale * F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss + watermark.loss(model, images, labels, step=step, epoch=epoch))
            optimizer.step()
            step += 1
    assert verify(net, key, held_out_target_images()).bit_error_rate == 0
    assert accuracy(net) > 0.9


def test_optimizers_of_other_networks_are_not_measured():
    fabric, net, other = Fabric(accelerator="cpu", devices=1), mlp(), mlp()
    watermark = FabricGradSigns(fabric, make_key())
    images, labels = next(iter(train_loader()))
    watermark.loss(net, images, labels, step=0)
    for network, factor in ((other, 1e3), (net, 1.0)):
        optimizer = torch.optim.SGD(network.parameters(), 0.0)
        (factor * F.cross_entropy(network(images), labels)).backward()
        optimizer.step()
    own = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    torch.testing.assert_close(watermark.watermarker.state.task_gradient.length(), own)


def test_a_watermark_that_is_gone_hooks_nothing():
    fabric, net = Fabric(accelerator="cpu", devices=1), mlp()
    watermark = FabricGradSigns(fabric, make_key())
    marker = watermark.watermarker
    images, labels = next(iter(train_loader()))
    watermark.loss(net, images, labels, step=0)
    del watermark
    F.cross_entropy(net(images), labels).backward()
    torch.optim.SGD(net.parameters(), 0.0).step()
    assert marker.state.task_gradient.n_noted == 0
