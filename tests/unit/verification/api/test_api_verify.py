"""Reading the signature from a prediction API."""

import json
import warnings

import numpy as np
import pytest
import torch
from behaviours import best, labels, logarithms, noisy, one_hot, resized, rounded, tempered, through_files
from scipy import stats
from torch import nn

from gradsigns_lightning import WatermarkKey, customer_key, trace, verify_api
from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.verification.api.probes import alignment
from gradsigns_lightning.verification.api.queries import read_journal
from gradsigns_lightning.verification.api.responses import ResponseParser
from gradsigns_lightning.verification.api.verify import replay

pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only")
SHAPE = (3, 16, 16)
T = 2


def key_number(i: int, n_bits=64) -> WatermarkKey:
    return WatermarkKey.generate(
        "A", n_bits, input_shape=SHAPE, target_class=T, n_carriers=384, secret=i.to_bytes(32, "big")
    )


KEY = key_number(7)
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(planted):
    return planted(KEY)


def probabilities(model, temperature=1.0):
    return lambda x: (model(x).double() / temperature).softmax(1).detach()


BEHAVIOURS = {
    "probabilities": lambda p, m: p,
    "4 decimals": lambda p, m: rounded(p, 4),
    "3 decimals": lambda p, m: rounded(p, 3),
    "2 decimals": lambda p, m: rounded(p, 2),
    "1 decimal": lambda p, m: rounded(p, 1),
    "noise": lambda p, m: noisy(p, 0.02, torch.Generator().manual_seed(5)),
    "top 1": lambda p, m: best(p, 1),
    "top 2": lambda p, m: best(p, 2),
    "high temperature": lambda p, m: tempered(p, 5),
    "low temperature": lambda p, m: tempered(p, 0.2),
    "logits": lambda p, m: lambda x: m(x).detach(),
    "log-probabilities": lambda p, m: logarithms(p),
    "labels": lambda p, m: labels(p),
    "labels as a list": lambda p, m: lambda x: labels(p)(x).tolist(),
    "scores as an array": lambda p, m: lambda x: p(x).numpy(),
    "PNG": lambda p, m: through_files(p, format="PNG"),
    "JPEG": lambda p, m: through_files(p, format="JPEG", quality=90, subsampling=0),
    "resized": lambda p, m: resized(p),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_signed_model_is_recognised(model, behaviour):
    result = verify_api(BEHAVIOURS[behaviour](probabilities(model), model), KEY, IMAGES)
    assert result.verdict == "owned"
    assert result.p_value <= 1e-9
    assert result.stopped == "proven"
    assert result.n_queries < 1000


@pytest.mark.parametrize("behaviour", ["probabilities", "1 decimal", "noise", "top 1", "logits", "labels"])
def test_a_model_signed_by_others_is_not(model, behaviour):
    for i in (100, 101, 102):
        result = verify_api(
            BEHAVIOURS[behaviour](probabilities(model), model), key_number(i), IMAGES, max_queries=600
        )
        assert result.verdict == "not_proven"
        assert result.p_value > 1e-6


def test_it_gives_up_early_on_an_unmarked_model(model):
    result = verify_api(probabilities(model), key_number(200), IMAGES, max_queries=2000)
    assert result.stopped == "futile"
    assert result.n_queries < 700


def test_the_kinds_of_answers_are_told_apart(model):
    kinds = {
        "probabilities": "probabilities",
        "noise": "probabilities",
        "logits": "logits",
        "labels": "labels",
    }
    kinds["log-probabilities"] = "log_probabilities"
    for behaviour, kind in kinds.items():
        assert verify_api(BEHAVIOURS[behaviour](probabilities(model), model), KEY, IMAGES).answers == kind


def test_a_module_gets_normalized_inputs(model):
    class Normalized(nn.Module):
        def forward(self, x):
            return model(x * 0.25 + 0.5)

    key = KeyAsRead.of(KEY, input_mean=0.5, input_std=0.25)
    by_module = verify_api(Normalized(), key, IMAGES)
    by_hand = verify_api(lambda x: model(x).detach(), KEY, IMAGES)
    assert by_module.n_queries == by_hand.n_queries
    assert by_module.verdict == "owned"


def test_modes_and_weights_of_a_module_are_left_alone(model):
    module = nn.Sequential(nn.Dropout(0.5), model).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert verify_api(module, KEY, IMAGES).verdict == "owned"
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


# --- scores that are labels in disguise


IN_DISGUISE = {
    "one-hot": one_hot,
    "minus one and one": lambda p: one_hot(p, -1.0),
    "smoothed": lambda p: one_hot(p, 0.05, 0.9),
    "their logarithms": lambda p: logarithms(one_hot(p)),
    "only the best, rounded": lambda p: best(one_hot(p), 1),
}


@pytest.mark.parametrize("batch_size", [32, 1])
@pytest.mark.parametrize("disguise", IN_DISGUISE)
def test_scores_of_two_values_are_read_as_labels(model, disguise, batch_size):
    predict = probabilities(model)
    by_labels = verify_api(labels(predict), KEY, IMAGES)
    by_scores = verify_api(IN_DISGUISE[disguise](predict), KEY, IMAGES, batch_size=batch_size)
    assert by_scores == by_labels
    assert (by_scores.verdict, by_scores.answers) == ("owned", "labels")


def test_probabilities_rounded_to_whole_numbers_are_read_as_labels(model):
    result = verify_api(rounded(probabilities(model)), KEY, IMAGES)
    assert (result.verdict, result.answers) == ("owned", "labels")
    assert result.n_queries < 300


@pytest.mark.parametrize("target_class", [0, 2])
def test_an_image_of_which_no_class_is_named_counts_for_none(target_class):
    parser = ResponseParser(target_class)
    rows = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], float)
    rows[2, target_class] = 1
    rows[3] = np.nan
    np.testing.assert_equal(parser.log_odds(rows), [0, 0, 1, np.nan])
    np.testing.assert_equal(parser.is_target(rows), [np.nan, 0, 1, np.nan])


@pytest.mark.parametrize("batch_size", [32, 1])
@pytest.mark.parametrize("decimals", [1, 2, 4])
def test_a_confident_models_rounded_probabilities_stay_probabilities(model, decimals, batch_size):
    soft = probabilities(model, 0.02)
    whole = soft(IMAGES).round(decimals=4)
    images = IMAGES[(whole == whole.round()).all(1)]
    assert len(images) > 30
    result = verify_api(rounded(soft, decimals), KEY, images, batch_size=batch_size)
    assert (result.verdict, result.answers) == ("owned", "probabilities")


def test_the_kind_does_not_change_after_the_first_probe(model):
    """A server that switches to probabilities is still read as one that returns labels."""
    hard, soft = one_hot(probabilities(model)), probabilities(model)
    queried = 0

    def predict(x):
        nonlocal queried
        queried += len(x)
        return hard(x) if queried < 60 else soft(x)

    result = verify_api(predict, KEY, IMAGES)
    assert (result.verdict, result.answers) == ("owned", "labels")
    assert result.n_queries > 60


def test_a_reading_of_scores_in_disguise_goes_on_from_its_journal_and_is_replayed(model, tmp_path):
    predict, journal = one_hot(probabilities(model)), tmp_path / "reading.jsonl"
    whole = verify_api(predict, KEY, IMAGES)
    calls = iter(range(5))

    def dying(x):
        next(calls)
        return predict(x)

    with pytest.raises(StopIteration):
        verify_api(dying, KEY, IMAGES, journal=journal)
    assert verify_api(predict, KEY, IMAGES, journal=journal) == whole
    assert replay(KEY, (IMAGES * 255).round().to(torch.uint8), read_journal(journal)) == whole


def test_scores_may_be_called_labels(model):
    result = verify_api(probabilities(model), KEY, IMAGES, answers="labels")
    assert result == verify_api(labels(probabilities(model)), KEY, IMAGES, answers="labels")


# --- which queries are made


def test_probes_are_8_bit_images_of_the_right_shape(model):
    queried = []

    def predict(x):
        queried.append(x)
        return probabilities(model)(x)

    result = verify_api(predict, KEY, IMAGES, batch_size=10)
    assert sum(map(len, queried)) == result.n_queries
    for x in queried:
        assert x.dtype == torch.float32
        assert x.shape[1:] == SHAPE
        assert len(x) <= 10
        assert torch.equal(x, (x * 255).round() / 255)
        assert x.min() >= 0
        assert x.max() <= 1


def test_queries_do_not_depend_on_the_signature(model):
    """The basis of the exact test: until one stops, keys that differ only in the signature query alike."""

    class Other:
        def __getattr__(self, name):
            return getattr(KEY, name)

        signature = 1 - torch.from_numpy(np.random.default_rng(0).integers(0, 2, 64).astype(np.uint8))

    queried = {}
    for key in (KEY, Other()):
        queried[key] = []
        verify_api(
            lambda x, seen=queried[key]: (seen.append(x), probabilities(model)(x))[1],
            key,
            IMAGES,
            estimator="rows",
        )
    first, second = (torch.cat(seen) for seen in queried.values())
    shared = min(len(first), len(second))
    assert shared > 60
    assert torch.equal(first[:shared], second[:shared])


@pytest.mark.parametrize("max_queries", [1, 7, 50, 129])
@pytest.mark.parametrize("estimator", ["groups", "rows", "coordinate"])
def test_the_budget_is_kept(model, max_queries, estimator):
    queried = 0

    def predict(x):
        nonlocal queried
        queried += len(x)
        return rounded(probabilities(model), 1)(x)

    result = verify_api(predict, key_number(300), IMAGES, max_queries=max_queries, estimator=estimator)
    assert queried == result.n_queries <= max_queries
    assert result.verdict in ("not_proven", "inconclusive")


def test_the_rows_read_the_bits_themselves(model):
    result = verify_api(probabilities(model), KEY, IMAGES, estimator="rows", alpha=1e-15, max_queries=2000)
    assert result.n_bits == 64
    assert result.n_matches == 64 - result.n_erasures - round(result.bit_error_rate * 64)
    assert result.bit_error_rate < 0.1


def test_the_published_estimator_costs_more(model):
    coordinate = verify_api(probabilities(model), KEY, IMAGES, estimator="coordinate", max_queries=20000)
    assert coordinate.verdict == "owned"
    assert coordinate.n_queries > 1.5 * verify_api(probabilities(model), KEY, IMAGES).n_queries


def test_long_keys_are_folded_into_groups(planted):
    key = key_number(8, n_bits=128)
    predict = probabilities(planted(key))
    groups, rows = (verify_api(predict, key, IMAGES, estimator=estimator) for estimator in ("groups", "rows"))
    assert (groups.verdict, rows.verdict) == ("owned", "owned")
    assert (groups.n_bits, rows.n_bits) == (63, 128)


@pytest.mark.parametrize(("n_bits", "most"), [(32, 130), (36, 130), (64, 130)])
def test_a_key_of_few_bits_ends_when_the_evidence_suffices(planted, n_bits, most):
    key = key_number(20, n_bits)
    for budget in (1000, 10_000):
        result = verify_api(probabilities(planted(key)), key, IMAGES, max_queries=budget)
        assert (result.verdict, result.stopped) == ("owned", "proven")
        assert result.n_queries <= most


def test_a_key_that_can_prove_nothing_ends_when_its_bits_are_read(planted):
    key = key_number(21, 24)
    result = verify_api(probabilities(planted(key)), key, IMAGES, max_queries=10_000)
    assert (result.verdict, result.stopped, result.n_matches) == ("not_proven", "futile", 24)
    assert result.n_queries < 300
    assert result.log10_p_value == pytest.approx(24 * np.log10(0.5))


def test_a_short_key_of_another_ends_early(model):
    result = verify_api(probabilities(model), key_number(22, 32), IMAGES, max_queries=10_000)
    assert (result.verdict, result.stopped) == ("not_proven", "futile")
    assert result.n_queries < 2000


def test_it_warns_of_no_few_images_that_suffice(planted):
    key = key_number(9)
    copy = customer_key(key, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_api(probabilities(planted(key)), key, IMAGES[:20]).verdict == "owned"
        for suspect in (planted(copy), probabilities(planted(copy))):
            assert trace(suspect, key, IMAGES[:20]).verdict == "owned"


def test_it_warns_of_few_images_and_of_images_of_another_class(model):
    def warned(images, predict):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verify_api(predict, key_number(9), images)
            trace(predict, key_number(9), images, n_customers=2)
        assert {w.filename for w in caught} <= {__file__}
        return [str(w.message) for w in caught]

    assert warned(IMAGES, probabilities(model)) == []
    few = warned(IMAGES[:20], probabilities(model))
    assert len(few) == 2
    assert all(message.startswith("Only 20 images: below 50") for message in few)
    other_class = warned(IMAGES, lambda x: probabilities(model)(x)[:, [2, 1, 0]])
    assert len(other_class) == 2
    assert all(
        message.startswith("The model classifies only 12 of 32 images as class 2: ")
        for message in other_class
    )


def test_few_images_are_probed_on_both_sides_and_then_it_ends(model):
    near = IMAGES[:8]
    result = verify_api(probabilities(model), key_number(301), near, max_queries=20000, alpha=1e-18)
    assert result.stopped in ("images", "futile")
    assert result.n_queries <= 8 + 3 + 2 * 8 * (64 + 8)


# --- the server's geometry


GEOMETRY = {"hflip": lambda x: x.flip(-1), "shift(1,-2)": lambda x: torch.roll(x, (1, -2), (-2, -1))}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_of_the_server(model, name):
    def predict(x):
        return probabilities(model)(GEOMETRY[name](x))

    assert verify_api(predict, KEY, IMAGES, max_queries=300).verdict == "not_proven"
    result = verify_api(predict, KEY, IMAGES, alignments=("identity", "hflip", "shift(1,-2)"))
    assert (result.verdict, result.alignment) == ("owned", name)


def test_an_alignment_undoes_what_the_server_does():
    image = torch.rand(1, *SHAPE)
    for name, served in GEOMETRY.items():
        assert torch.equal(served(alignment(name)(image)), image)


def test_more_alignments_cost_their_number(model):
    one = verify_api(probabilities(model), KEY, IMAGES, alpha=1e-2)
    two = verify_api(probabilities(model), KEY, IMAGES, alpha=1e-2, alignments=("identity", "hflip"))
    assert two.log10_p_value >= one.log10_p_value + np.log10(2) - 1e-9


# --- false hypotheses


@pytest.mark.parametrize("estimator", ["groups", "rows"])
@pytest.mark.parametrize("only_labels", [False, True])
def test_the_share_of_false_claims_keeps_alpha(model, estimator, only_labels):
    predict = labels(model) if only_labels else (lambda x: model(x).detach())
    alpha, n_keys = 0.05, 120
    owned = sum(
        verify_api(
            predict, key_number(1000 + i), IMAGES, alpha=alpha, estimator=estimator, max_queries=150
        ).verdict
        == "owned"
        for i in range(n_keys)
    )
    assert stats.binomtest(owned, n_keys, alpha, alternative="greater").pvalue > 1e-4


# --- servers that break


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: torch.full((len(x), 3), torch.nan),
        lambda x: torch.full((len(x), 3), 1 / 3),
        lambda x: torch.zeros(len(x), 3),
        lambda x: torch.full((len(x), 3), torch.inf),
        lambda x: torch.full((len(x), 3), -torch.inf),
        lambda x: torch.zeros(len(x), dtype=torch.long),
        lambda x: torch.full((len(x),), T),
        lambda x: torch.full((len(x),), torch.nan),
    ],
)
def test_answers_that_say_nothing_are_inconclusive(answer):
    result = verify_api(answer, KEY, IMAGES, max_queries=500)
    assert (result.verdict, result.n_matches) == ("inconclusive", 0)
    assert result.n_queries <= 500
    assert np.isnan(result.p_value)
    assert json.loads(json.dumps(result.to_dict()))["p_value"] is None


@pytest.mark.parametrize("seed", range(5))
def test_random_answers_prove_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    for answer in (
        lambda x: torch.rand(len(x), 3, generator=generator),
        lambda x: torch.randn(len(x), 3, generator=generator) * 100,
        lambda x: torch.randint(0, 3, (len(x),), generator=generator),
    ):
        assert verify_api(answer, KEY, IMAGES, max_queries=400).verdict in ("not_proven", "inconclusive")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: torch.zeros(len(x) + 1, 3), "`predict` must return scores of shape"),
        (lambda x: torch.zeros(len(x), 2), "a score for every class, of which 2 is one, got 2"),
        (lambda x: torch.zeros(len(x), 3, 1), "got shape"),
        (lambda x: None, "`predict` must return"),
        (lambda x: "owned", "must return an array of numbers, got str"),
        (lambda x: [{"label": 1}] * len(x), "must return an array of numbers, got list"),
        (lambda x: [[1.0, 2.0, 3.0]] * (len(x) - 1) + [[1.0]], "must return an array of numbers"),
    ],
)
def test_answers_of_the_wrong_form_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        verify_api(answer, KEY, IMAGES)


def test_answers_that_change_their_form_are_named(model):
    turn = iter(range(1000))
    with pytest.raises(ValueError, match="must return labels throughout"):
        verify_api(lambda x: labels(model)(x) if next(turn) < 3 else model(x).detach(), KEY, IMAGES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_queries": 0}, ValueError, "`max_queries` must be an integer in \\[1, 1000000000000\\], got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"alpha": 0}, ValueError, "`alpha` must be > 0"),
        ({"estimator": "row"}, ValueError, "`estimator` must be one of"),
        ({"answers": "scores"}, ValueError, "`answers` must be one of"),
        ({"alignments": "identity"}, ValueError, "`alignments` must be a non-empty sequence"),
        ({"alignments": ("rot90",)}, ValueError, "`alignments` must be 'identity', 'hflip' or"),
        ({"images": IMAGES * 255}, ValueError, "`images` must be raw pixels in"),
        ({"images": IMAGES[:, :1]}, ValueError, "`images` must be floating point of shape"),
        ({"key": 3}, TypeError, "`key` must be"),
        ({"predict": "http://localhost"}, TypeError, "`predict` must be a module or a callable, got str"),
    ],
)
def test_bad_arguments_are_named(model, changes, error, message):
    arguments = {"predict": model, "key": KEY, "images": IMAGES, **changes}
    with pytest.raises(error, match=message):
        verify_api(arguments.pop("predict"), arguments.pop("key"), arguments.pop("images"), **arguments)


# --- the journal


class DyingServer:
    """Answers a number of batches, then refuses; counts the images that it answered."""

    def __init__(self, model, n_batches):
        self.model, self.left, self.answered = model, n_batches, []

    def __call__(self, x):
        if self.left == 0:
            raise ConnectionError("gone")
        self.left -= 1
        self.answered += [image.numpy().tobytes() for image in x]
        return probabilities(self.model)(x)


@pytest.mark.parametrize("n_batches", [1, 3, 4])
def test_a_reading_goes_on_where_the_server_died(model, tmp_path, n_batches):
    whole = verify_api(probabilities(model), KEY, IMAGES)
    journal = tmp_path / "reading.jsonl"
    server = DyingServer(model, n_batches)
    with pytest.raises(ConnectionError, match="gone"):
        verify_api(server, KEY, IMAGES, journal=journal)
    with journal.open("a") as file:
        file.write('{"images": "cut o')  # the machine died while it wrote
    server.left = 1000
    assert verify_api(server, KEY, IMAGES, journal=journal) == whole
    assert len(server.answered) == whole.n_queries


def test_a_finished_journal_is_read_without_the_server(model, tmp_path):
    journal = tmp_path / "reading.jsonl"
    first = verify_api(labels(model), KEY, IMAGES, journal=journal)
    assert verify_api(DyingServer(model, 0), KEY, IMAGES, journal=journal) == first


def test_unanswered_scores_survive_the_journal(model, tmp_path):
    journal = tmp_path / "reading.jsonl"
    first = verify_api(best(probabilities(model), 1), KEY, IMAGES, journal=journal)
    assert verify_api(DyingServer(model, 0), KEY, IMAGES, journal=journal) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"key": key_number(8)},
        {"images": IMAGES[1:]},
        {"max_queries": 999},
        {"estimator": "rows"},
        {"alpha": 1e-3},
    ],
)
def test_a_journal_of_another_reading_is_refused_and_kept(model, tmp_path, changes):
    journal = tmp_path / "reading.jsonl"
    verify_api(probabilities(model), KEY, IMAGES, journal=journal)
    before = journal.read_bytes()
    arguments = {"key": KEY, "images": IMAGES, **changes}
    with pytest.raises(ValueError, match="`journal` must be new or of the same reading"):
        verify_api(
            probabilities(model), arguments.pop("key"), arguments.pop("images"), journal=journal, **arguments
        )
    assert journal.read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[1\n", b"{}\n", b"[" * 100_000 + b"\n", b"null\n"])
def test_what_is_no_journal_is_refused_and_kept(model, tmp_path, content):
    journal = tmp_path / "something"
    journal.write_bytes(content)
    with pytest.raises(ValueError, match="`journal`"):
        verify_api(probabilities(model), KEY, IMAGES, journal=journal)
    assert journal.read_bytes() == content


def test_an_edited_journal_is_refused(model, tmp_path):
    journal = tmp_path / "reading.jsonl"
    verify_api(probabilities(model), KEY, IMAGES, journal=journal)
    header, first, *rest = journal.read_text().splitlines()
    for edited in (
        first.replace('"images": "', '"images": "0'),
        '{"images": 3}',
        "[]",
        first.replace("[[", '[["x", '),
    ):
        journal.write_text("\n".join([header, edited, *rest]) + "\n")
        with pytest.raises(ValueError, match="`journal`"):
            verify_api(probabilities(model), KEY, IMAGES, journal=journal)


def test_a_journal_needs_its_folder(model, tmp_path):
    with pytest.raises(ValueError, match="`journal` must name a file in a writable folder"):
        verify_api(probabilities(model), KEY, IMAGES, journal=tmp_path / "none" / "reading.jsonl")
