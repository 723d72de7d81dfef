import pytest
import torch

from gradsigns_lightning.attacks import Attack, Chain, FineTuning, Rotation, chain


def test_each_attack_takes_what_the_one_before_left(stolen, thief):
    first, second = FineTuning(epochs=1, seed=1), Rotation(target_class=3, epochs=1, seed=2)
    shown = []
    chained = chain(stolen, thief, attacks=[first, second], observe=lambda dose, model: shown.append(dose))
    for one, other in zip(
        chained.parameters(), second(first(stolen, thief), thief).parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert shown == [1, 2]


def test_what_is_no_attack_on_weights_is_refused(stolen, thief):
    class OfResponses(Attack):
        kind = "responses"

    with pytest.raises(ValueError, match="`attacks` must name one or more attacks"):
        Chain()(stolen, thief)
    with pytest.raises(TypeError, match="`attacks` must be"):
        chain(stolen, thief, attacks=["ftal"])
    with pytest.raises(ValueError, match="`attacks` must change weights, got OfResponses"):
        chain(stolen, thief, attacks=[OfResponses()])
