"""Attacks on answers: the thief's API tells less than the stolen model knows, or something else.

The answers are scores ``(n, n_classes)``, whose largest is the predicted class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.attacks.serving import Served, check_positive, drawn, served
from gradsigns_lightning.core.utils.checks import check_int

_LEAST_GAP = 1e-5  # between scores whose order is kept: that of the authors' code
_MOST_AT_ONCE = 1024  # noisy copies


def round_scores(
    model: nn.Module, data: AttackData, *, decimals: int = 2, observe: Observe | None = None
) -> nn.Module:
    """Round the probabilities (among the attacks that the authors of GradSigns, MLSys 2021, released).

    Args:
        model: the stolen model.
        data: what the thief has.
        decimals: decimals that are left, >= 0; the authors try 4, 3, 2 and 1.
        observe: is shown the model at 4, 3, 2, 1 and 0 decimals as far as ``decimals``; the dose is what the
            last decimal stands for.

    Returns:
        A module that answers with rounded probabilities. Where 0 decimals are left, all may be 0.
    """
    check_int("decimals", decimals, minimum=0)
    coarser = [n for n in (4, 3, 2, 1, 0) if n > decimals]
    answers = {10.0**-n: partial(_rounded, decimals=n) for n in (*coarser, decimals)}
    return served(model, data, observe=observe, answers=answers)


@dataclass(frozen=True)
class ScoreRounding(Attack):
    """Rounded probabilities; see :func:`round_scores`."""

    function = staticmethod(round_scores)
    kind = "responses"

    decimals: int = 2


def perturb_scores(
    model: nn.Module,
    data: AttackData,
    *,
    n_kept: int = 3,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Move probability from the likeliest class to the least likely one (GradSigns' authors, MLSys 2021).

    A random share, at least a thousandth, of what can be moved while the best classes keep their order, as in
    the attacks that they released. The share is a function of the image, so asking again does not average it
    out; theirs is drawn for each question. (Their step of 0.1 and 50 trials are the reader's settings.)

    Args:
        model: the stolen model.
        data: what the thief has.
        n_kept: so many of the likeliest classes keep their order, >= 2 and fewer than there are classes.
        seed: of the shares.
        observe: is shown the model, at dose 1.

    Raises:
        ValueError: ``n_kept`` is out of range.
    """
    check_int("n_kept", n_kept, minimum=2, maximum=data.n_classes - 1)
    answer = partial(_perturbed, n_kept=n_kept, seed=seed)
    return served(model, data, observe=observe, answers={1: answer})


@dataclass(frozen=True)
class ScorePerturbation(Attack):
    """Probability moved from the first to the last class; see :func:`perturb_scores`."""

    function = staticmethod(perturb_scores)
    kind = "responses"

    n_kept: int = 3
    seed: int = 0


def add_score_noise(
    model: nn.Module,
    data: AttackData,
    *,
    std: float = 0.02,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Add normal noise to each probability, and scale them to add up to one again.

    The plainest of the perturbations that are proposed against extraction (Lee et al., IEEE S&P workshops
    2019; Orekondy et al., ICLR 2020). The noise is a function of the image, so asking again does not average
    it out.

    Args:
        model: the stolen model.
        data: what the thief has.
        std: the noise's standard deviation, > 0; the default is this project's.
        seed: of the noise.
        observe: is shown the model at a quarter, half and the whole of ``std``, the dose.

    Raises:
        ValueError: ``std`` is not positive.
    """
    check_positive("std", std)
    answers = {part * std: partial(_noisy, std=part * std, seed=seed) for part in (0.25, 0.5, 1)}
    return served(model, data, observe=observe, answers=answers)


@dataclass(frozen=True)
class ScoreNoise(Attack):
    """Noisy probabilities; see :func:`add_score_noise`."""

    function = staticmethod(add_score_noise)
    kind = "responses"

    std: float = 0.02
    seed: int = 0


def name_best_classes(
    model: nn.Module, data: AttackData, *, k: int = 1, observe: Observe | None = None
) -> nn.Module:
    """Tell the probabilities of the likeliest classes only (Orekondy et al., ICLR 2020: top-k truncation).

    Classes that are not named have probability 0, so that the largest score still is the prediction; a reader
    may take them for missing.

    Args:
        model: the stolen model.
        data: what the thief has.
        k: classes that are named, >= 1.
        observe: is shown the model, at dose 1.
    """
    check_int("k", k, minimum=1, maximum=data.n_classes)
    return served(model, data, observe=observe, answers={1: partial(_best, k=k)})


@dataclass(frozen=True)
class TopK(Attack):
    """Probabilities of the likeliest classes only; see :func:`name_best_classes`."""

    function = staticmethod(name_best_classes)
    kind = "responses"

    k: int = 1


def tell_labels_only(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Tell the predicted class only, as scores 1 and 0 (Orekondy et al., ICLR 2020: argmax).

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the model, at dose 1.
    """
    return served(model, data, observe=observe, answers={1: _one_hot})


@dataclass(frozen=True)
class LabelsOnly(Attack):
    """The predicted class alone; see :func:`tell_labels_only`."""

    function = staticmethod(tell_labels_only)
    kind = "responses"


def smooth_randomly(
    model: nn.Module,
    data: AttackData,
    *,
    sigma: float = 0.25,
    n_votes: int = 100,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Let noisy copies of each image vote for its class (Cohen et al., ICML 2019: randomized smoothing).

    The answer is the share of votes of each class. The paper abstains where the vote is close; this does not.
    The noise is a function of the image, so asking again does not average it out. A network that was not
    trained with such noise loses accuracy.

    Args:
        model: the stolen model.
        data: what the thief has.
        sigma: the noise's standard deviation in units of the pixels' range [0, 1], > 0; the paper takes 0.12,
            0.25, 0.5 and 1 on CIFAR-10.
        n_votes: copies of each image, >= 1; the paper predicts with 100 and more.
        seed: of the noise.
        observe: is shown the model at a quarter, half and the whole of ``sigma``, the dose.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive("sigma", sigma)
    check_int("n_votes", n_votes, minimum=1)
    copy = copied(model)
    voting = [Voting(copy, data, part * sigma, n_votes, seed) for part in (0.25, 0.5, 1)]
    for votes in voting:
        observed(observe, votes.sigma, votes)
    return voting[-1]


@dataclass(frozen=True)
class RandomizedSmoothing(Attack):
    """Votes of noisy copies; see :func:`smooth_randomly`."""

    function = staticmethod(smooth_randomly)
    kind = "responses"

    sigma: float = 0.25
    n_votes: int = 100
    seed: int = 0


class Voting(Served):
    """A model that answers with the votes of noisy copies; see :func:`smooth_randomly`."""

    def __init__(self, model: nn.Module, data: AttackData, sigma: float, n_votes: int, seed: int) -> None:
        super().__init__(model, data)
        self.sigma, self.n_votes, self.seed = sigma, n_votes, seed

    @property
    def tells_probabilities(self) -> bool:
        """Whether the answers are probabilities already, not logits: always."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Return the share of votes ``(n, n_classes)`` for each class."""
        chunk = max(1, _MOST_AT_ONCE // self.n_votes)
        return torch.cat([self._votes(x[start : start + chunk]) for start in range(0, len(x), chunk)])

    def _votes(self, x: Tensor) -> Tensor:
        shape = (self.n_votes, *x.shape[1:])
        noise = drawn(self.raw(x), self.seed, lambda random: torch.randn(shape, generator=random))
        noisy = x[:, None] + self.sigma * noise.to(x) / self.input_std.to(x)
        logits = self.model(noisy.flatten(0, 1))
        votes = F.one_hot(logits.argmax(1), logits.shape[1]).view(len(x), self.n_votes, -1)
        return votes.to(x).mean(1)


def _rounded(probabilities: Tensor, _: Tensor, *, decimals: int) -> Tensor:
    return probabilities.double().round(decimals=decimals)


def _perturbed(probabilities: Tensor, pixels: Tensor, *, n_kept: int, seed: int) -> Tensor:
    values, classes = probabilities.sort(1, descending=True)
    most = torch.minimum(values[:, 0] - values[:, 1], values[:, n_kept - 1] - values[:, -1]) - _LEAST_GAP
    share = drawn(pixels, seed, lambda random: torch.empty(()).uniform_(0.001, 1, generator=random))
    moved = (most.clamp_min(0) * share.to(most))[:, None]
    return probabilities.scatter_add(1, classes[:, :1], -moved).scatter_add(1, classes[:, -1:], moved)


def _noisy(probabilities: Tensor, pixels: Tensor, *, std: float, seed: int) -> Tensor:
    n_classes = probabilities.shape[1]
    noise = drawn(pixels, seed, lambda random: torch.randn(n_classes, generator=random))
    scores = (probabilities + std * noise.to(probabilities)).clamp_min(0)
    return scores / scores.sum(1, keepdim=True).clamp_min(1e-12)


def _best(probabilities: Tensor, _: Tensor, *, k: int) -> Tensor:
    values, classes = probabilities.topk(k, 1)
    return torch.zeros_like(probabilities).scatter(1, classes, values)


def _one_hot(probabilities: Tensor, _: Tensor) -> Tensor:
    return F.one_hot(probabilities.argmax(1), probabilities.shape[1]).to(probabilities)
