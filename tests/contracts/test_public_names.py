"""Names and signatures that callers and the documentation rely on; change them knowingly."""

import inspect

import pytest

import gradsigns_lightning
from gradsigns_lightning import (
    ApiVerificationResult,
    GradSigns,
    VerificationResult,
    WatermarkKey,
    customer_key,
    strip,
    trace,
    verify,
    verify_api,
    verify_many,
)

NAMES = [
    "ApiVerificationResult",
    "Cadence",
    "FabricGradSigns",
    "GradSigns",
    "GradSignsMixin",
    "MarginObjective",
    "Message",
    "PaperObjective",
    "StrengthSchedule",
    "TraceResult",
    "VerificationResult",
    "WatermarkKey",
    "customer_key",
    "message_key",
    "read_message",
    "strip",
    "trace",
    "verify",
    "verify_api",
    "verify_many",
]

SIGNATURES = {
    GradSigns: (
        "key, *, strength=1.0, objective='margin', engine='auto', cadence=None, n_images=32, momentum=0.5, "
        "n_val_images=256, name='wm', carrier_layer=None"
    ),
    WatermarkKey.generate: (
        "owner, n_bits=128, *, input_shape, target_class, n_carriers=None, payload=None, input_mean=0.0, "
        "input_std=1.0, scope='', secret=None"
    ),
    WatermarkKey.load: "path",
    strip: "checkpoint, out, *, overwrite=False",
    WatermarkKey.save: "self, path, *, overwrite=False",
    verify: (
        "model, key, images, *, alpha=1e-09, batch_size=None, logits=None, carrier_layer=None, "
        "input_mean=None, input_std=None"
    ),
    trace: "suspect, master, images, *, n_customers=10000, alpha=1e-09, max_queries=1000",
    customer_key: "master, customer",
    verify_many: "model, keys, images, *, alpha=1e-09, batch_size=None, logits=None, carrier_layer=None",
    verify_api: (
        "predict, key, images, *, max_queries=1000, alpha=1e-09, estimator='groups', answers=None, "
        "alignments=('identity',), batch_size=32, journal=None"
    ),
    VerificationResult: (
        "n_bits, n_matches, n_erasures, bit_error_rate, p_value, log10_p_value, margin, n_queries, alpha, "
        "verdict, commitment, recognised, free_bits"
    ),
    ApiVerificationResult: (
        "n_bits, n_matches, n_erasures, bit_error_rate, p_value, log10_p_value, margin, n_queries, alpha, "
        "verdict, commitment, recognised, free_bits, answers, estimator, alignment, step, n_images, "
        "n_looks, stopped"
    ),
}


def text_of(function) -> str:
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))[1:-1]


def test_the_public_names_contain_the_promised_ones():
    assert sorted(gradsigns_lightning.__all__) == NAMES


def test_every_public_name_exists():
    assert all(hasattr(gradsigns_lightning, name) for name in gradsigns_lightning.__all__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures_are_frozen(function):
    assert text_of(function) == SIGNATURES[function]
