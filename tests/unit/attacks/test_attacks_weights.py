"""What all attacks on weights have in common."""

import copy
import random

import numpy as np
import pytest
import torch

from gradsigns_lightning import attacks
from gradsigns_lightning.attacks.recovery import accuracy, few, up_to, weights_of
from gradsigns_lightning.models import MLP, SmallResNet, ViT

QUICK = [
    attacks.Pruning(epochs=1, scope="global"),
    attacks.ChannelPruning(epochs=1),
    attacks.FinePruning(share=0.5, epochs=1),
    attacks.Quantization(bits=7),
    attacks.Int8(),
    attacks.WeightNoise(),
    attacks.WeightShifting(epochs=1),
    attacks.CheckpointAveraging(epochs=1),
    attacks.ModeConnectivity(end_epochs=1, curve_epochs=1, n_images=64),
    attacks.AdversarialNeuronPruning(n_steps=3, mask_rate=20.0),
    attacks.ReconstructiveNeuronPruning(unlearn_epochs=2, recover_epochs=2, mask_rate=20.0),
    attacks.LipschitzPruning(deviations=2.0),
]
IDS = [type(attack).__name__ for attack in QUICK]
REFUSED = {
    *((n, "ChannelPruning") for n in ("ViT", "Encoder")),
    *((n, "LipschitzPruning") for n in ("ViT", "MLP", "Encoder")),
}


class Encoder(torch.nn.Module):
    """PyTorch's own transformer, which reads weights of its layers without calling them."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1).view(-1, 4, 16)).mean(1))


def outputs(model, thief):
    x = torch.stack([thief.clean[i][0] for i in range(8)])
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("attack", QUICK, ids=IDS)
def test_the_copy_is_changed_and_nothing_else(stolen, thief, attack):
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    gradients = [p.requires_grad for p in stolen.parameters()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    attacked = attack(stolen, thief)
    assert list(before) == list(stolen.state_dict())
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert flags == [m.training for m in stolen.modules()]
    assert gradients == [p.requires_grad for p in stolen.parameters()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert not any(m.training for m in attacked.modules())
    assert not torch.equal(outputs(attacked, thief), outputs(stolen, thief))
    assert torch.equal(outputs(attacked, thief), outputs(attack(stolen, thief), thief))


@pytest.mark.parametrize("attack", QUICK, ids=IDS)
@pytest.mark.parametrize(
    "network", [MLP((1, 8, 8), 10, (16, 16)), ViT((1, 8, 8), 10, dim=16, depth=1), Encoder()]
)
def test_other_networks_are_attacked_or_refused(thief, network, attack):
    if (type(network).__name__, type(attack).__name__) in REFUSED:
        with pytest.raises(ValueError, match=r"`model` must"):
            attack(network, few(thief, 64, seed=0))
    else:
        assert outputs(attack(network, few(thief, 64, seed=0)), thief).isfinite().all()


@pytest.mark.parametrize("attack", QUICK, ids=IDS)
def test_doses_ascend_to_what_is_returned(stolen, thief, attack):
    doses, seen = [], []

    def observe(dose, model):
        assert not model.training
        doses.append(dose)
        seen.append(outputs(model, thief))

    attacked = attack(stolen, few(thief, 128, seed=0), observe=observe)
    assert doses == sorted(set(doses))
    assert any(torch.equal(seen_at, outputs(attacked, thief)) for seen_at in seen[-2:])


def test_weights_are_matrices_and_kernels():
    names = {name for _, name in weights_of(ViT((1, 8, 8), 10, depth=1))}
    assert names == {"weight"}
    sizes = [getattr(module, name).ndim for module, name in weights_of(SmallResNet(1, 10))]
    assert sizes == [4] * 9 + [2]
    with pytest.raises(ValueError, match="`model` must have layers with weights"):
        weights_of(torch.nn.Flatten())


def test_doses_reach_the_last():
    assert up_to(0.3, 0.1) == [0.1, 0.2, 0.3]
    assert up_to(0.25, 0.1) == [0.1, 0.2, 0.25]
    assert up_to(0.05, 0.1) == [0.05]


def test_few_images_are_some_of_all(stolen, thief):
    some = few(thief, 50, seed=1)
    (x, y), *rest = list(some.in_order())
    assert not rest
    assert x.shape == (50, 1, 8, 8)
    everything = [image for image, _ in (thief.clean[i] for i in range(thief.n_images))]
    assert all(any(torch.equal(image, other) for other in everything) for image in x)
    assert len({tuple(image.flatten().tolist()) for image in x}) == 50
    assert few(thief, 10**6, seed=0).n_images == thief.n_images
    assert accuracy(stolen, some) == (stolen(x).argmax(1) == y).float().mean().item()
