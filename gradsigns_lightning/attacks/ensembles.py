"""An ensemble of networks that each learnt from a part of the stolen one's answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, observed
from gradsigns_lightning.attacks.extraction import student, with_answers
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int, check_number


def extract_ensemble(
    model: nn.Module,
    data: AttackData,
    *,
    n_networks: int = 3,
    smoothing: float = 0.2,
    network: Any = "same",
    answers: str = "probabilities",
    epochs: int = 60,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Train an ensemble on the stolen model's answers (Watermark-Robustness-Toolbox; Lukas et al., 2022).

    The thief's images are split at random into equal parts, and a new network is trained on each as in
    :func:`retrain`, the answers smoothed. The toolbox leaves open how the networks answer together; here the
    mean of their probabilities counts.

    Args:
        model: the stolen model.
        data: what the thief has.
        n_networks: networks and parts of the images, >= 1.
        smoothing: share of each answer that is spread over all classes, in [0, 1].
        network: what is trained, as in :func:`retrain`; from a network that has weights all start alike.
        answers: ``"probabilities"``, or ``"labels"`` if the model tells no more.
        epochs: epochs of each network, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        seed: of the parts, the new weights and the batches.
        observe: is shown the ensemble after each network; the dose is the number of networks.

    Returns:
        The ensemble.

    Raises:
        TypeError: ``network`` is not one, and does not make one.
        ValueError: a setting is out of range, there are fewer images than networks, or a network does not
            answer with a score for each class.
    """
    check_int("n_networks", n_networks, minimum=1, maximum=data.n_images)
    check_number("smoothing", smoothing, minimum=0, maximum=1)
    recipe = replace(data.recipe.scaled(epochs, rate_factor), label_smoothing=smoothing)
    taught = with_answers(model, data, answers)
    order = torch.randperm(data.n_images, generator=torch.Generator().manual_seed(seed))
    ensemble = Ensemble()
    for i, part in enumerate(order.tensor_split(n_networks)):
        learner = student(model, data, network, seed + i)
        ensemble.networks.append(train(learner, taught.part(part), recipe, seed=seed + i))
        observed(observe, i + 1, ensemble)
    return ensemble.eval()


class Ensemble(nn.Module):
    """Networks that answer together, by the mean of their probabilities; ``networks`` are its members."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms ``(n, n_classes)`` of the mean probabilities of normalized inputs."""
        each = torch.stack([network(x).log_softmax(1) for network in self.networks])
        return each.logsumexp(0) - math.log(len(self.networks))


@dataclass(frozen=True)
class EnsembleExtraction(Attack):
    """An ensemble that learns stolen answers; see :func:`extract_ensemble`."""

    function = staticmethod(extract_ensemble)

    n_networks: int = 3
    smoothing: float = 0.2
    network: Any = "same"
    answers: str = "probabilities"
    epochs: int = 60
    rate_factor: float = 1.0
    seed: int = 0
