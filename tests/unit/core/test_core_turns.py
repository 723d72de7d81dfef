"""Several optimizers that step together or take turns."""

import pytest

from gradsigns_lightning.core.turns import Turns


def embed(turns, step, *optimizers):
    """Return the state after a batch that embeds, from ``step`` on, and the optimizers that got the mark."""
    turns, taken = turns.opening(step).marking(), []
    for optimizer in optimizers:
        taken.append(turns.takes(optimizer))
        turns = turns.noting(optimizer)
    return turns, taken


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("usual", [1, 2, 3, 4, 10, 30, 80, 320])
def test_each_of_several_that_take_turns_is_met_as_often(n, usual):
    turns, step, met = Turns(known=frozenset(range(n))), 0, []
    for n_embedded in range(1, n * n + 1):
        met.append(step % n)
        turns, _ = embed(turns, step, step % n)
        step += turns.interval(usual, n_embedded)
    assert [met.count(optimizer) for optimizer in range(n)] == [n] * n
    assert turns.left_out == []


def test_one_optimizer_and_several_that_step_together_keep_their_interval():
    for together in ([0], [0, 1], [0, 1, 2]):
        turns = Turns()
        for step in range(0, 8, len(together)):
            turns, _ = embed(turns, step, *together)
            assert [turns.interval(usual, n) for usual in (2, 80) for n in range(4)] == [2] * 4 + [80] * 4


def test_the_mark_is_in_the_first_gradient_of_each_optimizer_in_the_batch_that_embeds():
    turns, taken = embed(Turns(), 0, 0, 1)
    assert taken == [True, True]
    assert not turns.takes(0)  # a second step in the same batch
    turns = turns.opening(3)
    assert not turns.takes(0)
    turns, taken = embed(turns, 4, 0)
    assert taken == [True]
    assert not turns.opening(5).takes(1)


def test_accumulated_batches_are_one():
    turns = Turns().opening(0).marking().closing().opening(0)
    assert turns.takes(0)
    turns = turns.noting(0)
    assert turns.takes(1)
    # the following steps belong to another batch, even if that shows no images
    assert not turns.noting(1).closing().takes(2)


def test_who_was_never_met_is_named():
    turns, _ = embed(Turns(), 0, 1)
    assert turns.opening(1).noting(0).noting(2).left_out == [0, 2]


@pytest.mark.parametrize(("length", "steps"), [(1, 5), (2, 6), (3, 6), (5, 5)])
def test_an_interval_ends_where_a_batch_begins(length, steps):
    turns = Turns()
    for batch in range(3):
        turns = turns.opening(batch * length)
    assert turns.whole_batches(5) == steps
