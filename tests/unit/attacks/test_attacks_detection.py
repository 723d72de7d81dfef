import pytest
import torch

from gradsigns_lightning.attacks import rotate_suspect, suspect_class
from gradsigns_lightning.attacks.class_gradients import ClassImages
from gradsigns_lightning.attacks.detection import concentrations


def test_the_marked_class_is_found(stolen, unmarked, thief):
    images = ClassImages(thief)
    marked, usual = (concentrations(model, thief, images, n_images=100) for model in (stolen, unmarked))
    assert (marked - usual).argmax() == 3
    suspect, score = suspect_class(stolen, thief)
    assert suspect == 3
    assert score > 1


def test_the_mark_of_the_class_found_is_gone(stolen, thief, judge):
    attacked = rotate_suspect(stolen, thief, rate_factor=0.3)
    assert judge.log10_p_value(attacked) > -2
    assert judge.accuracy(attacked) > judge.accuracy(stolen) - 0.02


def test_the_mean_cosine_is_that_of_all_pairs(stolen, thief):
    from gradsigns_lightning.attacks.class_gradients import View, directions

    found = concentrations(stolen, thief, ClassImages(thief), n_images=1000)
    rows = directions(stolen, ClassImages(thief).of(2, 1000), View(2, 2), thief)
    cosines = rows @ rows.T
    n = len(rows)
    assert found[2] == pytest.approx(((cosines.sum() - cosines.trace()) / (n * (n - 1))).item(), abs=1e-5)


def test_a_twin_is_compared_with(stolen, thief):
    assert suspect_class(stolen, thief, twin=True)[0] == 3


def test_settings_are_checked(stolen, thief):
    with pytest.raises(ValueError, match="`n_images` must be"):
        suspect_class(stolen, thief, n_images=1)
    labels = torch.cat([y for _, y in thief.in_order()])
    with pytest.raises(ValueError, match="images of class 4, got none"):
        suspect_class(stolen, thief.relabelled(labels.where(labels != 4, 5)))
