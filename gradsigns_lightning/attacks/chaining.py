"""Chains: several attacks, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.core.utils.checks import check_instance


def chain(
    model: nn.Module, data: AttackData, *, attacks: Sequence[Attack] = (), observe: Observe | None = None
) -> nn.Module:
    """Attack one after the other: the combined attacks of Lukas et al. (IEEE S&P 2022).

    A rotation starts from the gradients that it finds: after another one it turns them back to the owner's
    mark (measured), so that a chain should have one at most.

    Args:
        model: the stolen model.
        data: what the thief has.
        attacks: the attacks with their settings, in order; one or more, all of which change weights.
        observe: is shown the model after each attack; the dose is the number of attacks.

    Returns:
        What the last attack returns.

    Raises:
        TypeError: something else is among the attacks.
        ValueError: there is no attack, or one that changes what goes into or comes out of a prediction API.
    """
    if not attacks:
        raise ValueError("`attacks` must name one or more attacks, got none.")
    for attack in attacks:
        check_instance("attacks", attack, Attack)
        if attack.kind != "model":
            raise ValueError(f"`attacks` must change weights, got {type(attack).__name__}.")
    attacked = copied(model)
    for number, attack in enumerate(attacks, start=1):
        attacked = attack(attacked, data)
        observed(observe, number, attacked)
    return attacked


@dataclass(frozen=True)
class Chain(Attack):
    """Attacks one after the other; see :func:`chain`."""

    function = staticmethod(chain)

    attacks: Sequence[Attack] = ()
