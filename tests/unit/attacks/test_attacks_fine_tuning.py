import copy
import random

import numpy as np
import pytest
import torch

from gradsigns_lightning.attacks.fine_tuning import FineTuning, fine_tune


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_the_stolen_model_carries_its_mark(stolen, unmarked, judge):
    assert judge.accuracy(stolen) > 0.9
    assert judge.verify(stolen).bit_error_rate < 0.1
    assert judge.log10_p_value(unmarked) > -3


@pytest.mark.parametrize("settings", [{}, {"layers": "last"}, {"head": "new", "labels": "predicted"}])
def test_the_copy_is_trained_and_the_rest_stays(stolen, thief, judge, settings):
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    attacked = fine_tune(stolen, thief, epochs=2, **settings)
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert flags == [m.training for m in stolen.modules()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert not torch.equal(weights(attacked), weights(stolen))
    assert judge.accuracy(attacked) > 0.9
    assert not attacked.training


def test_the_last_layer_alone_moves(stolen, thief):
    attacked = fine_tune(stolen, thief, layers="last", epochs=1)
    moved = [n for n, v in attacked.state_dict().items() if not torch.equal(v, stolen.state_dict()[n])]
    assert moved == ["head.weight", "head.bias"]


def test_the_class_does_what_the_function_does(stolen, thief):
    doses = []
    by_class = FineTuning(epochs=2, rate_factor=0.1)(
        stolen, thief, observe=lambda dose, model: doses.append(dose)
    )
    assert torch.equal(weights(by_class), weights(fine_tune(stolen, thief, epochs=2, rate_factor=0.1)))
    assert doses == [1, 2]


def test_a_larger_rate_erases_more(stolen, thief, judge):
    small, large = (judge.verify(fine_tune(stolen, thief, rate_factor=f)) for f in (0.03, 3.0))
    assert small.log10_p_value < large.log10_p_value


@pytest.mark.parametrize("setting", [{"layers": "first"}, {"head": "old"}, {"labels": "some"}, {"epochs": 0}])
def test_settings_are_checked(stolen, thief, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        fine_tune(stolen, thief, **setting)
