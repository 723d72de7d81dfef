import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import flush, overwrite
from gradsigns_lightning.attacks.overwriting import _Embedding


@pytest.mark.parametrize("n_marks", [1, 2])
def test_an_own_mark_takes_the_place_of_the_owners(stolen, armed, judge, n_marks):
    attacked = overwrite(stolen, armed, target_class=3, n_marks=n_marks)
    assert judge.log10_p_value(attacked) > -3
    assert judge.verify(attacked, armed.make_mark(3, 0).key).log10_p_value < -4
    assert judge.accuracy(attacked) > judge.accuracy(stolen) - 0.05


def test_marks_in_all_classes_need_no_knowledge_of_the_class(stolen, armed, judge):
    attacked = overwrite(stolen, armed, classes="all")
    assert judge.log10_p_value(attacked) > -4
    assert judge.accuracy(attacked) > judge.accuracy(stolen) - 0.05


def test_marks_in_another_class_leave_the_owners(stolen, armed, judge):
    assert judge.log10_p_value(overwrite(stolen, armed, target_class=8, rate_factor=0.3)) < -6


def test_an_unlearned_own_mark_takes_the_owners_along(stolen, armed, judge):
    attacked = flush(stolen, armed, target_class=3, rate_factor=0.3)
    assert judge.log10_p_value(attacked) > -2
    assert judge.verify(attacked, armed.make_mark(3, 0).key).log10_p_value > -4
    assert judge.accuracy(attacked) > judge.accuracy(stolen) - 0.02


def test_an_unmarked_model_carries_the_thiefs_mark_alone(unmarked, armed, judge):
    attacked = overwrite(unmarked, armed, target_class=3)
    assert judge.verify(attacked, armed.make_mark(3, 0).key).log10_p_value < -4
    found = [judge.verify(attacked, armed.make_mark(3, number).key).p_value for number in range(1, 41)]
    assert min(found) > 1e-4
    assert 10 < sum(p < 0.5 for p in found) < 30


def test_marks_take_turns():
    calls = []

    class Noting:
        def __init__(self, name):
            self.name = name

        def loss(self, model, x, y, step):
            calls.append((self.name, step))
            return None if step else torch.ones(())

        def before_step(self, parameters, step):
            calls.append((self.name, step, len(parameters)))

    network = nn.Linear(2, 2)
    embedding = _Embedding(network, [Noting("a"), Noting("b")], 0.0)
    x, y = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    values = []
    for step in range(3):
        values.append(embedding.loss(network, x, y).item())
        embedding.before_step(step)
    assert calls == [("a", 0), ("a", 0, 2), ("b", 0), ("b", 0, 2), ("a", 1), ("a", 1, 2)]
    assert values[0] == values[1] == pytest.approx(values[2] + 1)


@pytest.mark.parametrize("attack", [overwrite, flush])
@pytest.mark.parametrize(
    "setting", [{"classes": "some"}, {"target_class": -1}, {"n_marks": 0}, {"epochs": 0}]
)
def test_settings_are_checked(stolen, armed, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, armed, **setting)


def test_who_has_no_own_marks_cannot_overwrite(stolen, thief):
    with pytest.raises(ValueError, match="`data` must have a `make_mark`"):
        overwrite(stolen, thief)
