"""Factors on the neurons of a network, which are trained to tell which neurons to prune."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradsigns_lightning.attacks.base import AttackData, Observe, copied, last_layer, observed
from gradsigns_lightning.attacks.recovery import accuracy, weights_of

NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
Factors = Sequence[Tensor]


class NeuronMasks(nn.Module):
    """A network with a factor on each neuron, 1 at first; its own weights are not trained.

    Neurons are the channels of normalizations with scales or, in a network without them, the outputs of all
    layers but the head.

    Args:
        network: the network, which is copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copied(network).requires_grad_(False)
        self._names = _neuron_names(self.network)
        parameters = dict(self.network.named_parameters())
        self._weights = [parameters[name] for name in self._names]
        self._biases = [parameters.get(name.removesuffix("weight") + "bias") for name in self._names]
        self.masks = nn.ParameterList(torch.ones(len(w), device=w.device) for w in self._weights)

    def forward(self, x: Tensor, noise: Factors = ()) -> Tensor:
        """Return the logits; ``noise`` is what is added to each mask, then to each factor of a bias."""
        noise = noise or [torch.zeros_like(mask) for mask in (*self.masks, *self.masks)]
        n, changed = len(self.masks), {}
        for i, (name, mask) in enumerate(zip(self._names, self.masks, strict=True)):
            weight, bias = self._weights[i], self._biases[i]
            changed[name] = weight * (mask + noise[i]).view(-1, *[1] * (weight.ndim - 1))
            if bias is not None:
                changed[name.removesuffix("weight") + "bias"] = bias * (1 + noise[n + i])
        logits: Tensor = functional_call(self.network, changed, (x,))
        return logits

    @torch.no_grad()
    def clamp(self, _: int = 0) -> None:
        """Keep the masks in [0, 1]."""
        for mask in self.masks:
            mask.clamp_(0, 1)


def prune_neurons(
    model: nn.Module,
    data: AttackData,
    masks: Factors,
    *,
    threshold: float,
    tolerance: float,
    observe: Observe | None,
) -> nn.Module:
    """Silence the neurons with the smallest masks, more and more of them, as long as the accuracy holds.

    Args:
        model: the stolen model.
        data: what the thief has, on all of which the accuracy is measured.
        masks: of :class:`NeuronMasks` for the model.
        threshold: the highest mask of a neuron that is silenced.
        tolerance: what the accuracy may fall by, in [0, 1].
        observe: is shown the model at each share of neurons, from 0 in steps of about one percent to the
            share at which the accuracy fell too far.
    """
    best, least = copied(model), accuracy(model, data) - tolerance
    ranked = torch.cat([mask.detach() for mask in masks]).sort().values
    observed(observe, 0, best)
    every = max(1, len(ranked) // 100)
    small = ranked[ranked <= threshold]
    for highest in sorted({*small[every - 1 :: every].tolist(), *small[-1:].tolist()}):
        pruned = copied(model)
        _silence(pruned, masks, highest)
        observed(observe, (ranked <= highest).float().mean().item(), pruned)
        if accuracy(pruned, data) < least:
            break
        best = pruned
    return best


@torch.no_grad()
def _silence(model: nn.Module, masks: Factors, highest: float) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in zip(_neuron_names(model), masks, strict=True):
        parameters[name][mask <= highest] = 0


def _neuron_names(model: nn.Module) -> list[str]:
    """Return the names of the weights that have one entry, or one row, for each neuron."""
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, NORMALIZATIONS) and module.weight is not None and module.weight.ndim == 1
    ]
    if names:
        return names
    head, rows = last_layer(model).weight, [getattr(module, name) for module, name in weights_of(model)]
    hidden = {id(row) for row in rows if row is not head}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in hidden]
    if not names:
        raise ValueError("`model` must have layers before its head; found none.")
    return names
