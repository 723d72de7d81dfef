"""Attacks on what goes into and comes out of a thief's API."""

import copy
import io
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from gradsigns_lightning import WatermarkKey, attacks, verify_api
from gradsigns_lightning.attacks.base import AttackData, Recipe
from gradsigns_lightning.attacks.inputs import add_input_noise, compress_inputs, smooth_inputs
from gradsigns_lightning.attacks.occlusion import occlude_inputs
from gradsigns_lightning.attacks.reconstruction import reconstruct_inputs
from gradsigns_lightning.attacks.responses import (
    add_score_noise,
    name_best_classes,
    perturb_scores,
    round_scores,
    smooth_randomly,
)
from gradsigns_lightning.attacks.serving import Served, drawn

FILTERS = [
    attacks.JpegCompression(),
    attacks.JpegCompression(quality=45),
    attacks.InputQuantization(),
    attacks.FeatureSqueezing(),
    attacks.InputSmoothing(),
    attacks.InputSmoothing(smoothing="mean"),
    attacks.InputSmoothing(smoothing="median"),
    attacks.InputNoising(std=0.05),
    attacks.InputFlipping(),
    attacks.InputOcclusion(),
    attacks.InputReconstruction(complexity=8, epochs=2),
]
ANSWERS = [
    attacks.ScoreRounding(),
    attacks.ScorePerturbation(),
    attacks.ScoreNoise(),
    attacks.TopK(),
    attacks.LabelsOnly(),
    attacks.RandomizedSmoothing(n_votes=10),
]
ALL = [*FILTERS, *ANSWERS, attacks.OcclusionTraining(epochs=1)]
SHAPE = (3, 16, 16)
KEY = WatermarkKey.generate(
    "A", 64, input_shape=SHAPE, target_class=2, n_carriers=384, secret=(7).to_bytes(32, "big")
)
COLORED = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


def name(attack):
    settings = [str(value) for key, value in vars(attack).items() if key != "seed"]
    return "-".join([type(attack).__name__, *settings])


@pytest.fixture
def pixels(digits):
    return digits.raw_images("test")[:100]


@pytest.fixture
def inputs(thief, pixels):
    return thief.normalized(pixels)


@pytest.fixture(scope="session")
def api(planted):
    """Return a model with the signature by construction, the thief's data for it, and its reader."""
    images = TensorDataset(COLORED, torch.zeros(len(COLORED), dtype=torch.long))
    data = AttackData(images, images, 3, (0.0,) * 3, (1.0,) * 3, Recipe())

    def read(model, key=KEY, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return verify_api(model, key, COLORED, **settings)

    return SimpleNamespace(model=planted(KEY), data=data, read=read)


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_the_model_given_stays_and_random_states_too(stolen, thief, attack):
    stolen.train()
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    doses = []
    attacked = attack(stolen, thief, observe=lambda dose, model: doses.append(dose))
    with torch.no_grad():
        scores = attacked(torch.zeros(3, 1, 8, 8))
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert flags == [m.training for m in stolen.modules()]
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert not any(module.training for module in attacked.modules())
    assert scores.shape == (3, 10)
    assert doses == sorted(set(doses))
    assert doses


@pytest.mark.parametrize("attack", [*FILTERS, *ANSWERS], ids=name)
def test_the_stolen_network_answers_behind_the_api(stolen, thief, inputs, attack):
    assert attack.kind == "responses"
    attacked = attack(stolen, thief)
    inner, stolen = dict(attacked.named_parameters()), dict(stolen.named_parameters())
    assert all(torch.equal(inner[f"model.{name}"], value) for name, value in stolen.items())
    with torch.no_grad():
        assert torch.equal(attacked(inputs), copy.deepcopy(attacked)(inputs))  # asking again tells the same
        torch.testing.assert_close(attacked(inputs[7:9]), attacked(inputs)[7:9], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "attack",
    [
        attacks.JpegCompression(),
        attacks.InputQuantization(),
        attacks.FeatureSqueezing(),
        attacks.InputSmoothing(),
        attacks.InputNoising(),
        *ANSWERS[:-1],
        attacks.OcclusionTraining(epochs=2, rate_factor=0.3),
    ],
    ids=name,
)
def test_the_accuracy_stays(stolen, thief, judge, attack):
    assert judge.accuracy(attack(stolen, thief)) > judge.accuracy(stolen) - 0.05


def test_answers_keep_the_predictions(stolen, thief, inputs):
    with torch.no_grad():
        expected = stolen(inputs).argmax(1)
        for attack in (attacks.ScorePerturbation(), attacks.TopK(k=3), attacks.LabelsOnly()):
            assert torch.equal(attack(stolen, thief)(inputs).argmax(1), expected)


def test_apis_can_be_put_behind_each_other(stolen, thief, inputs):
    noisy = attacks.InputNoising()(stolen, thief)
    chain = attacks.TopK(k=2)(attacks.InputFlipping()(attacks.ScoreRounding()(noisy, thief), thief), thief)
    with torch.no_grad():
        expected = noisy(inputs.flip(3)).double().softmax(1).round(decimals=2)
        torch.testing.assert_close(chain(inputs).topk(2).values, expected.topk(2).values)
        votes = attacks.RandomizedSmoothing(n_votes=5)(stolen, thief)
        assert torch.equal(attacks.TopK(k=10)(votes, thief)(inputs), votes(inputs))


# --- filters


def filtered(attack, stolen, thief, pixels):
    with torch.no_grad():
        return attack(stolen, thief).image_filter(pixels)


def test_an_api_normalizes_as_the_network_expects(stolen, thief, inputs, pixels):
    attacked = attacks.InputQuantization(n_bins=4)(stolen, thief)
    by_hand = ((pixels * 4).floor().clamp_max(3) + 0.5) / 4
    with torch.no_grad():
        torch.testing.assert_close(attacked(inputs), stolen(thief.normalized(by_hand)), atol=1e-4, rtol=0)
        torch.testing.assert_close(Served(stolen, thief)(inputs), stolen(inputs))


def test_pixels_have_few_values(stolen, thief, pixels):
    for attack, n_values in (
        (attacks.InputQuantization(n_bins=5), 5),
        (attacks.FeatureSqueezing(bit_depth=2), 4),
    ):
        values = filtered(attack, stolen, thief, torch.rand(4, 1, 32, 32))
        assert len(values.unique()) == n_values
        assert values.min() >= 0
        assert values.max() <= 1


@pytest.mark.parametrize("n_channels", [1, 3])
def test_jpeg_is_the_encoder_s(api, n_channels):
    image = torch.linspace(0, 1, n_channels * 16 * 24).view(1, n_channels, 16, 24)
    images = TensorDataset(image, torch.zeros(1))
    data = AttackData(images, images, 3, (0.5,) * n_channels, (0.2,) * n_channels)
    changed = compress_inputs(api.model, data, quality=45).image_filter(image)
    array = (image[0] * 255).round().byte().permute(1, 2, 0).squeeze().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="jpeg", quality=45)
    expected = torch.from_numpy(np.array(Image.open(file))).view(16, 24, n_channels).permute(2, 0, 1)
    assert torch.equal((changed[0] * 255).round().byte(), expected)
    assert not torch.equal((changed * 255).round(), (image * 255).round())


def test_jpeg_needs_gray_or_colored_images(api):
    images = TensorDataset(torch.zeros(1, 2, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="`data` must have images of 1 or 3 channels, got 2"):
        compress_inputs(api.model, AttackData(images, images, 3, (0.5, 0.5), (0.2, 0.2)))


def test_smoothing_is_that_of_the_toolbox(stolen, thief):
    image = torch.rand(2, 1, 9, 9)
    gaussian = filtered(attacks.InputSmoothing(std=0.6), stolen, thief, image)
    offsets = torch.arange(-2.0, 3)
    kernel = torch.exp(-(offsets**2) / (2 * 0.6**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = torch.nn.functional.conv2d(image, kernel[None, None], padding=2)
    torch.testing.assert_close(gaussian, expected, atol=1e-4, rtol=0)
    mean = filtered(attacks.InputSmoothing(smoothing="mean"), stolen, thief, image)
    torch.testing.assert_close(mean[0, 0, 3, 4], image[0, 0, 2:5, 3:6].mean())
    torch.testing.assert_close(mean[0, 0, 0, 0], image[0, 0, :2, :2].sum() / 9)
    median = filtered(attacks.InputSmoothing(smoothing="median"), stolen, thief, image)
    assert median.shape == image.shape
    assert median[0, 0, 3, 4] == image[0, 0, 2:5, 3:6].median()


def test_images_are_mirrored(stolen, thief, pixels):
    assert torch.equal(filtered(attacks.InputFlipping(), stolen, thief, pixels), pixels.flip(3))


def test_noise_has_its_deviation_and_each_image_its_own(api):
    gray = torch.full((50, 3, 16, 16), 0.5) + torch.arange(50).view(-1, 1, 1, 1) * 1e-4
    noise = add_input_noise(api.model, api.data, std=0.05).image_filter(gray) - gray
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert noise.flatten(1).corrcoef().triu(1).abs().max() < 0.2
    other = add_input_noise(api.model, api.data, std=0.05, seed=1).image_filter(gray) - gray
    assert (noise * other).mean().abs() < 1e-4


def test_what_is_drawn_for_an_image_does_not_depend_on_the_others():
    images = torch.rand(5, 1, 4, 4)
    numbers = drawn(images, 3, lambda generator: torch.randn(2, generator=generator))
    assert torch.equal(numbers[3:4], drawn(images[3:4], 3, lambda g: torch.randn(2, generator=g)))
    assert len(numbers.unique()) == 10


def test_covers_are_rectangles_up_to_their_share(api):
    images = torch.full((200, 3, 16, 16), 2.0) + torch.arange(200).view(-1, 1, 1, 1)
    covered = (occlude_inputs(api.model, api.data, share=0.25).image_filter(images) != images).all(1)
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows[:, :, None] & columns[:, None])
    assert 5 <= rows.sum(1).max() <= 8
    assert covered.flatten(1).any(1).all()
    assert len(covered.flatten(1).unique(dim=0)) > 150


def test_an_auto_encoder_learns_to_reconstruct(stolen, thief, pixels, judge):
    errors = []
    reconstruct_inputs(
        stolen,
        thief,
        complexity=16,
        epochs=8,
        rate=1e-2,
        observe=lambda _, served: errors.append((served.image_filter(pixels) - pixels).pow(2).mean().item()),
    )
    assert errors[-1] < 0.5 * errors[0]
    assert errors[-1] < 0.2 * pixels.var()


def test_each_batch_is_trained_on_with_and_without_covers(stolen, thief):
    batches = []
    stolen.register_forward_pre_hook(lambda module, inputs: batches.append(thief.raw(inputs[0].detach())))
    attacks.OcclusionTraining(epochs=1, share=0.25)(stolen, thief)
    plain, covered = batches[0].chunk(2)
    changed = (plain - covered).abs().amax(1) > 1e-4
    assert changed.flatten(1).any(1).float().mean() > 0.9
    assert changed.any(2).sum(1).max() <= 4
    assert covered.min() >= 0
    others = [(batch.chunk(2)[0] - batch.chunk(2)[1]).abs().amax(1) > 1e-4 for batch in batches[1:3]]
    assert not torch.equal(others[0], others[1])


def test_a_mark_survives_little_training_on_covers_and_not_much(stolen, thief, judge):
    little = attacks.OcclusionTraining(epochs=1, rate_factor=0.03)(stolen, thief)
    much = attacks.OcclusionTraining(epochs=6, rate_factor=3.0)(stolen, thief)
    assert judge.log10_p_value(little) < -5
    assert judge.log10_p_value(much) > -5


# --- answers


def test_scores_are_rounded(stolen, thief, inputs):
    with torch.no_grad():
        scores = round_scores(stolen, thief, decimals=1)(inputs)
        expected = stolen(inputs).double().softmax(1)
    assert torch.equal(scores, scores.round(decimals=1))
    assert (scores - expected).abs().max() <= 0.05 + 1e-6


def test_perturbed_scores_keep_the_order_of_the_best(stolen, thief, inputs):
    with torch.no_grad():
        before, after = stolen(inputs).softmax(1), perturb_scores(stolen, thief)(inputs)
    moved = before - after
    assert torch.equal(before.topk(3).indices, after.topk(3).indices)
    assert torch.equal(moved.argmax(1), before.argmax(1))
    assert torch.equal(moved.argmin(1), before.argmin(1))
    torch.testing.assert_close(after.sum(1), torch.ones(len(after)))
    share = moved.amax(1) / torch.minimum(
        before.topk(2).values @ torch.tensor([1.0, -1.0]), before.topk(3).values[:, 2] - before.amin(1)
    )
    assert share.max() <= 1
    assert 0.2 < share.median() < 0.8


def test_noisy_scores_add_up(stolen, thief, inputs):
    with torch.no_grad():
        scores, expected = add_score_noise(stolen, thief, std=0.05)(inputs), stolen(inputs).softmax(1)
    torch.testing.assert_close(scores.sum(1), torch.ones(len(scores)))
    assert 0.02 < (scores - expected).std() < 0.06


def test_the_best_classes_are_named(stolen, thief, inputs):
    with torch.no_grad():
        scores, expected = name_best_classes(stolen, thief, k=3)(inputs), stolen(inputs).softmax(1)
    assert torch.equal((scores > 0).sum(1), torch.full((len(scores),), 3))
    torch.testing.assert_close(scores.topk(3).values, expected.topk(3).values)


def test_votes_are_those_of_noisy_copies(api):
    x = COLORED[:4]
    votes = smooth_randomly(api.model, api.data, sigma=0.1, n_votes=40)(x)
    torch.testing.assert_close(votes * 40, (votes * 40).round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(votes.sum(1), torch.ones(4))
    still = smooth_randomly(api.model, api.data, sigma=1e-6, n_votes=3)(x)
    assert torch.equal(still.argmax(1), api.model(x).argmax(1))
    assert set(still.unique().tolist()) <= {0.0, 1.0}


PROVEN = [
    attacks.ScoreRounding(decimals=4),
    attacks.ScoreRounding(decimals=2),
    attacks.ScoreRounding(decimals=1),
    attacks.ScorePerturbation(n_kept=2),
    attacks.ScoreNoise(std=0.02),
    attacks.TopK(),
    attacks.LabelsOnly(),
    attacks.RandomizedSmoothing(sigma=0.1, n_votes=20),
    attacks.JpegCompression(),
    attacks.InputQuantization(),
    attacks.FeatureSqueezing(),
    attacks.InputNoising(),
]


@pytest.mark.parametrize("attack", PROVEN, ids=name)
def test_a_clear_mark_is_proven_through_an_api(api, attack):
    result = api.read(attack(api.model, api.data))
    assert result.verdict == "owned"
    assert result.n_queries < 1000


def test_a_mirrored_mark_is_found_when_it_is_looked_for(api):
    flipped = attacks.InputFlipping()(api.model, api.data)
    assert api.read(flipped).verdict == "not_proven"
    assert api.read(flipped, alignments=("identity", "hflip")).alignment == "hflip"
    assert api.read(flipped, alignments=("identity", "hflip")).verdict == "owned"


def test_large_doses_make_reading_dearer(api):
    plain = api.read(api.model).n_queries
    for attack in (attacks.ScoreNoise(std=0.1), attacks.RandomizedSmoothing(n_votes=10)):
        result = api.read(attack(api.model, api.data), max_queries=2000)
        assert result.n_queries > 2 * plain


def test_another_key_is_not_proven_through_an_api(api):
    other = WatermarkKey.generate(
        "A", 64, input_shape=SHAPE, target_class=2, n_carriers=384, secret=(8).to_bytes(32, "big")
    )
    for attack in (attacks.ScoreNoise(), attacks.TopK(), attacks.JpegCompression()):
        assert api.read(attack(api.model, api.data), other, max_queries=400).p_value > 1e-4


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (attacks.JpegCompression, {"quality": 0}),
        (attacks.InputQuantization, {"n_bins": 1}),
        (attacks.FeatureSqueezing, {"bit_depth": 9}),
        (attacks.InputSmoothing, {"smoothing": "other"}),
        (attacks.InputSmoothing, {"kernel_size": 4}),
        (attacks.InputSmoothing, {"std": 0}),
        (attacks.InputNoising, {"std": -1}),
        (attacks.InputOcclusion, {"share": 0}),
        (attacks.InputReconstruction, {"complexity": 0}),
        (attacks.InputReconstruction, {"epochs": 0}),
        (attacks.OcclusionTraining, {"share": 2}),
        (attacks.ScoreRounding, {"decimals": -1}),
        (attacks.ScorePerturbation, {"n_kept": 1}),
        (attacks.ScorePerturbation, {"n_kept": 10}),
        (attacks.ScoreNoise, {"std": 0}),
        (attacks.TopK, {"k": 0}),
        (attacks.RandomizedSmoothing, {"sigma": 0}),
        (attacks.RandomizedSmoothing, {"n_votes": 0}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(**setting)(stolen, thief)


def test_doses_are_shown_on_the_way(stolen, thief):
    doses = []
    smooth_inputs(stolen, thief, std=0.65, observe=lambda dose, _: doses.append(dose))
    assert doses == [0.5, 0.6, 0.65]
    doses.clear()
    round_scores(stolen, thief, decimals=2, observe=lambda dose, _: doses.append(dose))
    assert doses == [1e-4, 1e-3, 1e-2]
