"""The buffer of the target class's most recent images."""

import pytest
import torch

from gradsigns_lightning.core.buffer import TargetBuffer

T = 7


def batch(*labels, start=0):
    """Return images whose pixels hold a serial number, one per label."""
    numbers = torch.arange(start, start + len(labels), dtype=torch.float32) + 1
    return numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.tensor(labels, dtype=torch.long)


def kept(buffer) -> list[float]:
    assert bool((buffer.images == buffer.images[:, :1, :1, :1]).all())
    return buffer.images[buffer.valid][:, 0, 0, 0].tolist()


def test_newest_first_over_batches():
    buffer = TargetBuffer(3, T)
    buffer.push(*batch(T, 1, T))
    assert kept(buffer) == [3, 1]
    buffer.push(*batch(0, T, 0, start=10))
    assert kept(buffer) == [12, 3, 1]
    buffer.push(*batch(T, T, start=20))
    assert kept(buffer) == [22, 21, 12]


@pytest.mark.parametrize("labels", [[], [1], [1, 2, 3], [T], [T] * 5, [T, 1] * 4])
@pytest.mark.parametrize("capacity", [1, 2, 4, 9])
def test_any_batch_against_a_plain_list(labels, capacity):
    buffer, expected = TargetBuffer(capacity, T), []
    for start in (0, 100, 200):
        images, classes = batch(*labels, start=start)
        buffer.push(images, classes)
        expected = [start + i + 1.0 for i in reversed(range(len(labels))) if labels[i] == T] + expected
        assert kept(buffer) == expected[:capacity]
        assert buffer.images.shape == (capacity, 1, 2, 2)
        assert buffer.valid.shape == (capacity,)
        assert buffer.valid.tolist() == sorted(buffer.valid.tolist(), reverse=True)


def test_no_other_class_and_no_blank_is_ever_kept_beside_a_target_image():
    buffer = TargetBuffer(5, T)
    buffer.push(*batch(1, 2, T, 3))
    assert buffer.valid.tolist() == [True] + [False] * 4
    assert buffer.images[:, 0, 0, 0].tolist() == [3.0] * 5
    buffer.push(*batch(T, 1, start=10))
    assert buffer.images[:, 0, 0, 0].tolist() == [11, 3, 11, 3, 11]


def test_a_batch_without_target_images_changes_nothing():
    buffer = TargetBuffer(2, T)
    buffer.push(*batch(T, T))
    buffer.push(*batch(1, 2, 3, start=5))
    assert kept(buffer) == [2, 1]


def test_before_any_target_image_nothing_is_valid():
    buffer = TargetBuffer(2, T)
    buffer.push(*batch(1, 2))
    assert kept(buffer) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_first_batch_sets_the_dtype(dtype):
    buffer = TargetBuffer(2, T)
    images, labels = batch(T)
    buffer.push(images.to(dtype), labels)
    buffer.push(images, labels)
    assert buffer.images.dtype == dtype
    assert buffer.images.device == images.device


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_labels_of_any_number_type(dtype):
    buffer = TargetBuffer(2, T)
    images, labels = batch(T, 1)
    buffer.push(images, labels.to(dtype))
    assert kept(buffer) == [1]


def test_another_device_starts_over():
    buffer = TargetBuffer(2, T)
    buffer.push(*batch(T))
    images, labels = batch(T, T)
    buffer.push(images.to("meta"), labels.to("meta"))
    assert buffer.images.device.type == "meta"


def test_images_are_copied_and_detached():
    buffer = TargetBuffer(1, T)
    images, labels = batch(T)
    images = images.clone().requires_grad_()
    buffer.push(images, labels)
    with torch.no_grad():
        images.zero_()
    assert kept(buffer) == [1]
    assert not buffer.images.requires_grad


def test_clear_forgets():
    buffer = TargetBuffer(2, T)
    buffer.push(*batch(T))
    buffer.clear()
    assert buffer.images is None
    buffer.push(*batch(T, start=9))
    assert kept(buffer) == [10]


def test_no_random_numbers_are_used():
    before = torch.get_rng_state()
    TargetBuffer(2, T).push(*batch(T, 1, T))
    assert torch.equal(before, torch.get_rng_state())
