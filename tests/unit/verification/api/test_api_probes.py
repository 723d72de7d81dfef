"""Probe images are exact 8-bit images, and the directions are the key's, the same on every machine."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.verification.api.probes import (
    blended,
    carrier_directions,
    group_directions,
    moved,
    permutation,
    row_directions,
    shuffled,
)

SHAPE = (2, 4, 4)
KEY = WatermarkKey.generate("A", 12, input_shape=SHAPE, target_class=0, n_carriers=20, secret=bytes(32))
BYTES = torch.arange(32, dtype=torch.uint8).view(SHAPE) * 8


def flat(directions):
    return directions.flatten(1)


# --- images


def test_a_probe_is_an_8_bit_image_moved_by_whole_grey_levels():
    directions = torch.tensor([0.0, 1.0, -1.0, 0.3, -0.14]).view(5, 1, 1, 1).expand(5, *SHAPE)
    grey = torch.full(SHAPE, 100, dtype=torch.uint8)
    probes = moved(grey, directions, 10)
    assert probes.dtype == torch.uint8
    assert [int(probe[0, 0, 0]) for probe in probes] == [100, 110, 90, 103, 99]
    assert all(len(probe.unique()) == 1 for probe in probes)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("step", [4, 16])
def test_black_and_white_pixels_move_both_ways(level, step):
    edge = torch.full(SHAPE, level, dtype=torch.uint8)
    up, down = (moved(edge, torch.ones(1, *SHAPE), sign * step).int() for sign in (1, -1))
    assert (up - down).unique().tolist() == [2 * step]


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_no_pixel_wraps_or_gives_way_by_more_than_16_levels(level):
    edge = torch.full(SHAPE, level, dtype=torch.uint8)
    up, down = (moved(edge, torch.ones(1, *SHAPE), sign * 64).unique().tolist() for sign in (1, -1))
    assert (down, up) == (([0], [80]) if level < 128 else ([175], [255]))
    assert moved(edge, torch.zeros(1, *SHAPE), 64).unique().tolist() == ([16] if level < 128 else [239])


def test_a_blend_starts_at_one_image_and_ends_at_the_other():
    other = 255 - BYTES
    assert torch.equal(blended(BYTES, other, 0.0), BYTES)
    assert torch.equal(blended(BYTES, other, 1.0), other)
    quarter = blended(BYTES, other, 0.25)
    assert quarter.dtype == torch.uint8
    assert torch.equal(quarter, (0.75 * BYTES.double() + 0.25 * other.double()).round().to(torch.uint8))


def test_a_shuffled_image_has_the_same_colours_elsewhere():
    mixed = shuffled(BYTES)
    assert mixed.shape == BYTES.shape
    assert not torch.equal(mixed, BYTES)
    colours = [sorted(map(tuple, image.flatten(1).T.tolist())) for image in (BYTES, mixed)]
    assert colours[0] == colours[1]  # the channels of a pixel stay together


# --- what a judge replays years later


def test_permutations_are_fixed_and_differ_from_label_to_label():
    assert permutation(10, "rows").tolist() == [2, 9, 0, 3, 1, 5, 8, 7, 4, 6]
    assert permutation(10, "images").tolist() == [6, 2, 5, 3, 4, 8, 0, 7, 9, 1]
    assert sorted(permutation(1000, "blocks")) == list(range(1000))


# --- directions


def test_a_rows_direction_is_the_row_at_the_carriers():
    directions = flat(row_directions(KEY))
    assert directions.shape == (12, math.prod(SHAPE))
    assert torch.equal(directions[:, KEY.carriers], KEY.projection.float())
    directions[:, KEY.carriers] = 0
    assert not directions.any()


def test_a_carriers_direction_is_one_there_alone():
    directions = flat(carrier_directions(KEY, slice(5, 9)))
    assert directions.nonzero().tolist() == [[i, int(carrier)] for i, carrier in enumerate(KEY.carriers[5:9])]
    assert directions.sum(1).tolist() == [1.0] * 4


def test_a_group_for_each_bit_is_its_row():
    directions, bits = group_directions(KEY, 12)
    order = permutation(12, "blocks")
    assert torch.equal(directions, row_directions(KEY)[order])
    assert torch.equal(bits, KEY.signature[order])


def test_a_group_adds_up_what_a_signed_model_shows():
    """The slopes of n rows, signed as the signature says, add up to sqrt(n) times the group's sign."""
    directions, bits = group_directions(KEY, 5)
    rows, signs = KEY.projection.double(), 2 * KEY.signature.double() - 1
    gradient = torch.linalg.lstsq(rows, signs).solution  # its product with each row is the row's sign
    slopes = flat(directions)[:, KEY.carriers].double() @ gradient
    sizes = [len(group) for group in np.array_split(range(12), 5)]
    torch.testing.assert_close(slopes, (2 * bits.double() - 1) * torch.tensor(sizes).double() ** 0.5)


def test_groups_know_relative_signs_only():
    """The basis of the exact test: the queries are the same for a signature and its complement."""
    shared = {name: getattr(KEY, name) for name in ("n_bits", "input_shape", "carriers", "projection")}
    complement = SimpleNamespace(signature=1 - KEY.signature, **shared)
    (directions, bits), (same, flipped) = group_directions(KEY, 5), group_directions(complement, 5)
    assert torch.equal(directions, same)
    assert torch.equal(bits, 1 - flipped)


@pytest.mark.parametrize("directions", [row_directions, lambda key: group_directions(key, 2)])
def test_a_strangers_key_cannot_take_all_memory(directions):
    key = SimpleNamespace(n_bits=4, input_shape=(3, 4096, 4096))
    with pytest.raises(ValueError, match="`key` must have at most 268435456 values in all directions"):
        directions(key)
