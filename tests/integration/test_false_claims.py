"""Fresh keys against real models: the matches are those of fair coins, whether the model is marked or not."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy import stats

from gradsigns_lightning import GradSigns, WatermarkKey, verify, verify_many
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import MLP, Classifier

N_BITS, N_KEYS = 32, 1000
DIGITS = Digits(batch_size=64)


def make_key(seed):
    return WatermarkKey.generate(
        "Acme",
        N_BITS,
        input_shape=DIGITS.input_shape,
        target_class=0,
        input_mean=DIGITS.mean,
        input_std=DIGITS.std,
        secret=seed.to_bytes(32, "big"),
    )


def goodness_of_fit(matches):
    """Return the p-value of a chi-square test against Binomial(N, 1/2).

    The tails are pooled until at least five are expected.
    """
    edges = [k for k in range(N_BITS + 1) if stats.binom.pmf(k, N_BITS, 0.5) * N_KEYS >= 5]
    low, high = edges[0], edges[-1]
    observed = np.bincount(np.clip(matches, low, high), minlength=high + 1)[low:]
    expected = stats.binom.pmf(np.arange(low, high + 1), N_BITS, 0.5)
    expected[0] += stats.binom.cdf(low - 1, N_BITS, 0.5)
    expected[-1] += stats.binom.sf(high, N_BITS, 0.5)
    return stats.chisquare(observed, expected * N_KEYS).pvalue


@pytest.fixture(scope="module", params=["unmarked", "marked"])
def model(request):
    torch.manual_seed(0)
    classifier = Classifier(
        MLP(input_shape=(1, 8, 8), n_classes=10, hidden=(256, 128)), 10, label_smoothing=0.1
    )
    trainer = L.Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[GradSigns(make_key(0))] if request.param == "marked" else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, DIGITS)
    DIGITS.setup("test")
    owned = verify(classifier, make_key(0), DIGITS.raw_images("test", 0)).verdict == "owned"
    assert owned == (request.param == "marked")
    return classifier


def test_a_thousand_fresh_keys_match_like_fair_coins(model):
    images = DIGITS.raw_images("test", 0)
    results = verify_many(model, [make_key(seed) for seed in range(1, N_KEYS + 1)], images)
    matches = np.array([r.n_matches for r in results])
    assert goodness_of_fit(matches) > 1e-3
    assert all(r.verdict == "not_proven" for r in results)


def test_the_goodness_of_fit_test_can_fail():
    biased = stats.binom.rvs(N_BITS, 0.54, size=N_KEYS, random_state=0)
    assert goodness_of_fit(biased) < 1e-6
