"""torchvision's classifiers carry the mark, one of each family that two cores can train for a few steps."""

import pytest
import torch

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.core import EmbeddingSettings, Watermarker
from gradsigns_lightning.models import torchvision_model

pytestmark = pytest.mark.usefixtures("seeded")
FAMILIES = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "mnasnet0_5",
    "regnet_y_400mf",
    "efficientnet_b0",
    "densenet121",
    "googlenet",
    "convnext_tiny",
    "swin_t",
]


def prepared(name, size=64):
    network = torchvision_model(name, n_classes=4)
    key = WatermarkKey.generate("Acme", 8, input_shape=(3, size, size), target_class=0, secret=bytes(32))
    images = torch.rand(8, 3, size, size)
    marker = Watermarker(key, EmbeddingSettings(n_images=8, cadence=1, momentum=0.0))
    marker.observe(images, torch.zeros(8, dtype=torch.long), step=0)
    task = torch.nn.Parameter(torch.zeros(1))
    task.grad = torch.ones(1)
    marker.observe_gradients(0, [task], step=0)
    marker.prepare(network, network, images)
    return network, marker, images


@pytest.mark.parametrize("name", FAMILIES)
def test_signs_the_images_that_it_embeds(name):
    network, marker, images = prepared(name)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(30):
        optimizer.zero_grad()
        loss = marker.loss(network, network, step=step, epoch=0)
        if marker.state.value < 0.1:  # a wrong bit alone would make 1 / sqrt(8)
            break
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
    assert verify(network, marker.key, images).bit_error_rate == 0


def test_an_untrained_network_whose_logits_explode_is_not_refused():
    network, marker, images = prepared("inception_v3", size=75)
    with torch.no_grad():
        assert network.eval()(images).abs().max() > 1e6
    assert marker.engine.name == "double_backward"
