from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from gradsigns_lightning.data import ShiftFlip, TensorImages
from gradsigns_lightning.data.sources import keep_batch


def make(n: int = 10, **kwargs) -> TensorImages:
    images = torch.arange(n * 12, dtype=torch.int64).remainder(256).to(torch.uint8).view(n, 3, 2, 2)
    return TensorImages(images, torch.arange(n) % 4, **kwargs)


def test_a_batch_is_normalised_and_in_the_order_asked_for():
    source = make(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    x, y = source.__getitems__([7, 2])
    raw = make().raw(torch.tensor([7, 2]))
    expected = (raw - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.5, 0.25, 2.0]).view(
        1, 3, 1, 1
    )
    assert x.dtype == torch.float32
    assert torch.equal(x, expected)
    assert y.dtype == torch.int64
    assert y.tolist() == [3, 2]


def test_one_item_equals_its_row_of_the_batch():
    source = make(mean=(0.5,) * 3, std=(0.5,) * 3)
    x, y = source[4]
    assert torch.equal(x, source.__getitems__([4])[0][0])
    assert y == 0


def test_reading_does_not_change_what_is_stored():
    source = make(mean=(0.5,) * 3, std=(0.5,) * 3)
    first = source.__getitems__([1, 2])[0].clone()
    source.raw(torch.tensor([1, 2]))
    assert torch.equal(source.__getitems__([1, 2])[0], first)


def test_the_loader_keeps_the_batches_and_sees_each_image_once():
    loader = DataLoader(make(10), batch_size=4, shuffle=True, collate_fn=keep_batch)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 4, 2]
    seen = torch.cat([x for x, _ in batches]).flatten(1).sum(1).sort().values
    assert torch.allclose(seen, make(10).raw(torch.arange(10)).flatten(1).sum(1).sort().values)


def test_a_view_of_a_view_counts_in_the_view():
    view = make(10).view(torch.tensor([9, 5, 1])).view(torch.tensor([2, 0]))
    assert len(view) == 2
    assert view.labels.tolist() == [1, 1]
    assert torch.equal(view.raw(torch.tensor([0])), make(10).raw(torch.tensor([1])))


def test_a_view_leaves_the_transform_of_its_origin_alone():
    source = make(mean=(0.5,) * 3)
    before = source.__getitems__([0])[0].clone()
    source.view(torch.arange(3), mean=(0.9,) * 3, augment=lambda batch: batch * 0)
    assert torch.equal(source.__getitems__([0])[0], before)


def test_augmentation_runs_on_pixels_and_not_on_raw_images():
    source = make(augment=lambda batch: torch.full_like(batch, 255))
    assert torch.equal(source.__getitems__([0, 1])[0], torch.ones(2, 3, 2, 2))
    assert source.raw(torch.tensor([0])).max() < 0.1


def test_scale_is_the_pixel_value_of_one():
    source = TensorImages(torch.full((1, 1, 1, 1), 8, dtype=torch.uint8), torch.tensor([0]), scale=16.0)
    assert source.raw(torch.tensor([0])).item() == 0.5


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), TypeError, "`images` must be a uint8"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2), ValueError, "`images` must have shape"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), ValueError, "`images` must have shape"),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(2, 1),
            ValueError,
            "`labels` must have shape",
        ),
        ([0], torch.zeros(2), TypeError, "`images` must be torch.Tensor"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        TensorImages(images, labels)


def coordinates(n: int = 64, size: int = 10) -> torch.Tensor:
    """Every pixel holds 16 * row + column, so its origin can be read off."""
    grid = 16 * torch.arange(size).view(-1, 1) + torch.arange(size)
    return grid.to(torch.uint8).expand(n, 2, size, size).contiguous()


def test_shift_moves_each_sample_by_at_most_the_share_and_repeats_the_edge():
    torch.manual_seed(0)
    moved = ShiftFlip(shift=0.2, flip=False)(coordinates())
    assert moved.shape == (64, 2, 10, 10)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[:, 0], moved[:, 1])
    rows, columns = (moved[:, 0] // 16).long(), (moved[:, 0] % 16).long()
    dy, dx = rows[:, 5, 0] - 5, columns[:, 0, 5] - 5
    assert set(dy.tolist()) == set(dx.tolist()) == {-2, -1, 0, 1, 2}
    assert not torch.equal(dy, dx)
    expected = (torch.arange(10) + dy[:, None]).clamp(0, 9)
    assert torch.equal(rows, expected[:, :, None].expand_as(rows))
    expected = (torch.arange(10) + dx[:, None]).clamp(0, 9)
    assert torch.equal(columns, expected[:, None, :].expand_as(columns))


def test_flip_mirrors_about_half_of_the_samples_left_to_right():
    torch.manual_seed(0)
    batch = coordinates(400)
    flipped = ShiftFlip(shift=0.0)(batch)
    mirrored = (flipped == batch.flip(3)).flatten(1).all(1)
    unchanged = (flipped == batch).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert 140 < int(mirrored.sum()) < 260


def test_no_shift_and_no_flip_is_the_identity():
    batch = torch.rand(3, 1, 5, 7)
    assert torch.equal(ShiftFlip(shift=0.0, flip=False)(batch), batch)


def test_augmentation_works_on_images_that_are_not_square_and_follows_the_default_generator():
    batch = torch.rand(8, 3, 12, 20)
    torch.manual_seed(3)
    first = ShiftFlip(shift=0.25)(batch)
    torch.manual_seed(3)
    assert torch.equal(ShiftFlip(shift=0.25)(batch), first)
    assert first.shape == batch.shape
    assert not torch.equal(first, batch)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"shift": 1.5}, ValueError, "shift"),
        ({"shift": "a"}, TypeError, "shift"),
        ({"flip": 1}, TypeError, "flip"),
    ],
)
def test_wrong_augment_arguments_are_named(arguments, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        ShiftFlip(**arguments)
