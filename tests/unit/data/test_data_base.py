from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule

from gradsigns_lightning.data import Digits, ImageDataModule, TensorImages
from gradsigns_lightning.data.splits import random_split, stratified_split


class Counted(ImageDataModule):
    """100 training and 20 test images; the first pixel of an image is its number."""

    def __init__(self, **kwargs):
        super().__init__(
            **{"input_shape": (1, 2, 2), "n_classes": 5, "mean": (0.5,), "std": (0.25,)} | kwargs
        )
        self.loads: list[bool] = []

    def load_images(self, train: bool) -> TensorImages:
        self.loads.append(train)
        n = 100 if train else 20
        return TensorImages(
            torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2), torch.arange(n) % 5
        )


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def test_it_is_a_lightning_data_module_with_the_common_attributes():
    module = Counted()
    assert isinstance(module, LightningDataModule)
    assert (module.input_shape, module.n_classes, module.mean, module.std) == ((1, 2, 2), 5, (0.5,), (0.25,))


def test_train_and_val_share_out_the_training_images():
    module = Counted(val_fraction=0.25)
    train, val = numbers(module.raw_images("train")), numbers(module.raw_images("val"))
    assert len(val) == 25
    assert sorted(train + val) == list(range(100))
    assert numbers(module.raw_images("test")) == list(range(20))


def test_the_split_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = numbers(Counted(split_seed=3).raw_images("val"))
    torch.manual_seed(2)
    assert numbers(Counted(split_seed=3).raw_images("val")) == first
    assert numbers(Counted(split_seed=4).raw_images("val")) != first


def test_setup_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Counted().setup()
    Digits().setup()
    assert torch.equal(torch.get_rng_state(), before)


def test_each_stage_loads_what_it_needs_once():
    module = Counted()
    module.setup("fit")
    assert module.loads == [True]
    module.setup("validate")
    module.setup("test")
    module.setup()
    assert module.loads == [True, False]


def test_loaders_yield_normalised_batches_and_only_train_shuffles():
    module = Counted(batch_size=32, eval_batch_size=7, val_fraction=0.1)
    module.setup()
    batches = list(module.train_dataloader())
    assert [len(y) for _, y in batches] == [32, 32, 26]
    x = torch.cat([x for x, _ in batches]) * 0.25 + 0.5
    assert sorted(numbers(x)) == numbers(module.raw_images("train"))
    assert numbers(x) != numbers(module.raw_images("train"))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.tensor(numbers(x)) % 5)
    assert [len(y) for _, y in module.val_dataloader()] == [7, 3]
    tests = torch.cat([x for x, _ in module.test_dataloader()]) * 0.25 + 0.5
    assert numbers(tests) == list(range(20))
    assert len(module.predict_dataloader()) == 3


def test_only_training_batches_are_augmented():
    module = Counted(augment=lambda batch: torch.zeros_like(batch))
    assert all(bool((x == -2.0).all()) for x, _ in module.train_dataloader())
    assert not all(bool((x == -2.0).all()) for x, _ in module.val_dataloader())
    assert numbers(module.raw_images("train", limit=3)) != [0, 0, 0]


def test_workers_give_the_same_images():
    module = Counted(num_workers=1, eval_batch_size=8)
    assert numbers(torch.cat([x for x, _ in module.test_dataloader()]) * 0.25 + 0.5) == list(range(20))


def test_no_validation_images_is_possible():
    module = Counted(val_fraction=0.0)
    assert list(module.val_dataloader()) == []
    assert len(module.raw_images("train")) == 100


def test_raw_images_of_one_class():
    module = Counted()
    images = module.raw_images("test", class_index=3, limit=2)
    assert images.dtype == torch.float32
    assert images.shape == (2, 1, 2, 2)
    assert numbers(images) == [3, 8]
    assert len(module.raw_images("test", class_index=3)) == 4


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"`n_classes` is 4.*0 \.\.\. 4"):
        Counted(n_classes=4).setup()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"batch_size": 0}, ValueError),
        ({"batch_size": 1.5}, TypeError),
        ({"eval_batch_size": 0}, ValueError),
        ({"val_fraction": 1.0}, ValueError),
        ({"val_fraction": -0.1}, ValueError),
        ({"split_seed": -1}, ValueError),
        ({"num_workers": -1}, ValueError),
        ({"augment": 3}, TypeError),
        ({"input_shape": (28, 28)}, ValueError),
        ({"n_classes": 1}, ValueError),
        ({"mean": (0.1, 0.2)}, ValueError),
        ({"std": (0.0,)}, ValueError),
    ],
)
def test_wrong_arguments_are_named(arguments, error):
    with pytest.raises(error, match=f"`{next(iter(arguments))}`"):
        Counted(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("all",), "split"),
        (("test", 5), "class_index"),
        (("test", -1), "class_index"),
        (("test", 0, 0), "limit"),
    ],
)
def test_wrong_raw_images_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Counted().raw_images(*arguments)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="`stage`"):
        Counted().setup("training")


def test_random_split_rounds_and_covers():
    first, second = random_split(7, 0.3, seed=1)
    assert len(second) == 2
    assert torch.cat([first, second]).sort().values.tolist() == list(range(7))


def test_stratified_split_keeps_class_shares_and_permutes_classes_apart():
    labels = torch.tensor([0] * 50 + [1] * 50)
    first, second = stratified_split(labels, 0.2, seed=0)
    assert labels[second].bincount().tolist() == [10, 10]
    assert torch.cat([first, second]).sort().values.tolist() == list(range(100))
    assert second[:10].tolist() != (second[10:] - 50).tolist()


def test_digits_is_split_by_class():
    module = Digits()
    sizes = [len(module.raw_images(split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 1797
    assert sizes[2] == pytest.approx(0.3 * 1797, abs=5)
    assert sizes[1] == pytest.approx(0.1 * (1797 - sizes[2]), abs=5)
    per_class = [len(module.raw_images("test", class_index=c)) for c in range(10)]
    assert max(per_class) - min(per_class) <= 3
    raw = module.raw_images("train")
    assert raw.shape[1:] == (1, 8, 8)
    assert (float(raw.min()), float(raw.max())) == (0.0, 1.0)
    assert torch.equal(raw * 16, (raw * 16).round())
    x = torch.cat([x for x, _ in module.train_dataloader()])
    assert abs(float(x.mean())) < 0.05
    assert float(x.std()) == pytest.approx(1.0, abs=0.05)


def test_the_test_digits_do_not_depend_on_the_split_seed():
    a, b = Digits(split_seed=0), Digits(split_seed=1)
    assert torch.equal(a.raw_images("test"), b.raw_images("test"))
    assert not torch.equal(a.raw_images("val"), b.raw_images("val"))


def test_test_fraction_is_checked():
    with pytest.raises(ValueError, match="`test_fraction`"):
        Digits(test_fraction=1.0)
