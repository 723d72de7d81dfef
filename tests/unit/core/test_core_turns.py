"""Several optimizers, which step together or take turns."""

import pytest

from gradsigns_lightning.core.turns import Turns


def embed(turns, steps, *optimizers):
    """A batch that embeds, of the optimizer steps ``steps`` and on."""
    turns.open_batch(steps)
    turns.mark()
    return [turns.note(optimizer) for optimizer in optimizers]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("usual", [1, 2, 3, 4, 10, 30, 80, 320])
def test_each_of_several_that_take_turns_is_met_as_often(n, usual):
    turns, step, met = Turns(), 0, []
    for optimizer in range(n):
        turns.note(optimizer)
    for n_embedded in range(1, n * n + 1):
        met.append(step % n)
        embed(turns, step, step % n)
        step += turns.interval(usual, n_embedded)
    assert [met.count(optimizer) for optimizer in range(n)] == [n] * n
    assert turns.left_out == []


def test_one_optimizer_and_several_that_step_together_keep_their_interval():
    for together in ([0], [0, 1], [0, 1, 2]):
        turns = Turns()
        for step in range(0, 8, len(together)):
            embed(turns, step, *together)
            assert [turns.interval(usual, n) for usual in (2, 80) for n in range(4)] == [2] * 4 + [80] * 4


def test_the_mark_is_in_the_first_gradient_of_each_optimizer_in_the_batch_that_embeds():
    turns = Turns()
    assert embed(turns, 0, 0, 1) == [True, True]
    assert not turns.note(0)  # a second step in the same batch
    turns.open_batch(3)
    assert not turns.note(0)
    assert embed(turns, 4, 0) == [True]
    turns.open_batch(5)
    assert not turns.note(1)
    turns.open_batch(6)
    turns.mark()
    turns.take_back()
    assert not turns.note(0)


def test_accumulated_batches_are_one():
    turns = Turns()
    turns.open_batch(0)
    turns.mark()
    turns.close_batch()
    turns.open_batch(0)
    assert turns.note(0)
    assert turns.note(1)
    turns.close_batch()  # what follows is another batch's, also where that shows no images
    assert not turns.note(2)


def test_who_was_never_met_is_named():
    turns = Turns()
    embed(turns, 0, 1)
    turns.open_batch(1)
    turns.note(0)
    turns.note(2)
    assert turns.left_out == [0, 2]
    turns.reset()
    assert turns.left_out == []


@pytest.mark.parametrize(("length", "steps"), [(1, 5), (2, 6), (3, 6), (5, 5)])
def test_an_interval_ends_where_a_batch_begins(length, steps):
    turns = Turns()
    for batch in range(3):
        turns.open_batch(batch * length)
    assert turns.whole_batches(5) == steps
