"""Querying within a budget, in batches, and from a transcript."""

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.verification.api.queries import QueryBudget, Transcript, normalized
from gradsigns_lightning.verification.api.responses import ResponseParser

SHAPE = (1, 2, 4)
PIXELS = torch.arange(80, dtype=torch.uint8).view(10, *SHAPE)
READING = {"commitment": "ab" * 32}


class Server:
    """Answers ``[1 - p, p]`` with p the mean of an image; records the batches that it gets."""

    def __init__(self):
        self.queried = []

    def __call__(self, images):
        self.queried.append(images)
        p = images.double().mean((1, 2, 3))
        return torch.stack([1 - p, p], 1)

    @property
    def sizes(self):
        return [len(images) for images in self.queried]


class Recorder(Transcript):
    """A transcript in memory that records the calls of its methods."""

    def __init__(self, lines=()):
        super().__init__(lines, READING, name="the transcript")
        self.lines, self.calls = list(lines) or [self.header], []

    def prepare(self):
        self.calls.append("prepare")

    def record(self, digest, answer):
        self.calls.append("record")
        self.lines.append({"images": digest, "answer": answer.tolist()})


def budget(predict, *, kind=None, max_queries=100, batch_size=4, transcript=None):
    parser = ResponseParser(1, kind)
    return QueryBudget(predict, parser, max_queries=max_queries, batch_size=batch_size, transcript=transcript)


# --- which queries are made


def test_a_server_gets_all_images_once_in_their_order_raw_and_in_batches():
    server = Server()
    budget(server).query(PIXELS)
    assert server.sizes == [4, 4, 2]
    queried = torch.cat(server.queried)
    assert queried.dtype == torch.float32
    assert torch.equal(queried, PIXELS.float() / 255)


def test_an_answer_stands_where_its_image_did():
    log_odds, is_target = budget(Server(), kind="probabilities").query_and_classify(PIXELS)
    p = PIXELS.double().mean((1, 2, 3)).numpy() / 255
    np.testing.assert_allclose(log_odds, np.log(p / (1 - p)), rtol=1e-5)
    assert is_target.tolist() == [0] * 10


def test_an_oracle_of_normalized_inputs_gets_them():
    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=0, n_carriers=8, secret=bytes(32))
    server = Server()
    normalized(server, KeyAsRead.of(key, input_mean=0.5, input_std=0.25))(PIXELS.float() / 255)
    torch.testing.assert_close(server.queried[0], (PIXELS.float() / 255 - 0.5) / 0.25)


# --- the budget


@pytest.mark.parametrize("max_queries", [1, 4, 7, 10, 12])
def test_the_budget_is_spent_and_no_more(max_queries):
    server = Server()
    queries = budget(server, max_queries=max_queries)
    first, second = queries.query(PIXELS[:6]), queries.query(PIXELS[6:])
    spent = min(max_queries, 10)
    assert sum(server.sizes) == queries.n_queries == spent
    assert queries.exhausted == (max_queries <= 10)
    assert np.isfinite(np.concatenate([first, second])).tolist() == [i < spent for i in range(10)]


def test_nobody_is_asked_when_the_budget_is_spent():
    server = Server()
    queries = budget(server, max_queries=4)
    queries.query(PIXELS[:4])
    log_odds, is_target = queries.query_and_classify(PIXELS)
    assert np.isnan([log_odds, is_target]).all()
    assert server.sizes == [4]


@pytest.mark.parametrize("argument", ["max_queries", "batch_size"])
def test_a_budget_and_a_batch_are_at_least_one(argument):
    with pytest.raises(ValueError, match=f"`{argument}`.*got 0"):
        budget(Server(), **{argument: 0})


def test_batches_of_one_call_are_read_together():
    """A confident model's first batch looks like labels; the second shows that it was probabilities."""
    p = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.625, 0.75])
    batches = iter(torch.stack([1 - p, p], 1).split(4))
    queries = budget(lambda _: next(batches))
    log_odds = queries.query(PIXELS[:6])
    assert queries.parser.kind == "probabilities"
    assert log_odds[0] > log_odds[5] > log_odds[4] > 0 > log_odds[2]


# --- transcripts


def test_a_transcript_answers_without_the_server_and_at_the_same_price():
    recorder = Recorder()
    first = budget(Server(), transcript=recorder, max_queries=9)
    expected = first.query(PIXELS)

    def unanswered(_):
        raise AssertionError("the server was queried")

    again = Recorder(recorder.lines)
    replaying = budget(unanswered, transcript=again, max_queries=9)
    assert again.n_left == 3
    np.testing.assert_array_equal(replaying.query(PIXELS), expected)
    assert (replaying.n_queries, again.n_left, again.calls) == (first.n_queries, 0, [])


def test_a_transcript_that_ends_is_continued_by_the_server():
    recorder = Recorder()
    expected = budget(Server(), transcript=recorder).query(PIXELS)
    server, cut = Server(), Recorder(recorder.lines[:2])
    np.testing.assert_array_equal(budget(server, transcript=cut).query(PIXELS), expected)
    assert server.sizes == [4, 2]
    assert cut.lines == recorder.lines


def test_space_is_made_before_a_question_and_an_answer_kept_before_the_next():
    calls = []
    recorder = Recorder()
    recorder.calls = calls
    server = Server()
    budget(lambda images: (calls.append("query"), server(images))[1], transcript=recorder).query(PIXELS[:8])
    assert calls == ["prepare", "query", "record"] * 2


def test_what_is_no_answer_is_not_recorded():
    recorder = Recorder()
    with pytest.raises(ValueError, match="must return an array of numbers"):
        budget(lambda _: "busy", transcript=recorder).query(PIXELS)
    assert recorder.lines == [recorder.header]


def test_an_answer_to_other_images_is_refused():
    recorder = Recorder()
    budget(Server(), transcript=recorder).query(PIXELS)
    with pytest.raises(ValueError, match="`journal`: 'the transcript' does not fit this reading"):
        budget(Server(), transcript=Recorder(recorder.lines)).query(PIXELS.flip(0))


def test_a_transcript_of_another_reading_is_refused():
    lines = [{**Recorder().header, "commitment": "cd" * 32}]
    with pytest.raises(ValueError, match="`journal` must be new or of the same reading"):
        Recorder(lines)
