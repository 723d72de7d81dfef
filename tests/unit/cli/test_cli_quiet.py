"""The frameworks' advice stays off the terminal."""

import logging
import warnings

import pytest

from gradsigns_lightning.cli.quiet import quiet
from gradsigns_lightning.runs.options import spoken


@pytest.mark.parametrize(
    "package", ["lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"]
)
def test_lightning_says_nothing_under_any_of_its_names(package):
    above = logging.getLogger(package)
    before = above.level
    above.setLevel(logging.INFO)  # as the package does when it is imported
    try:
        with quiet():
            assert not logging.getLogger(f"{package}.utilities.rank_zero").isEnabledFor(logging.INFO)
    finally:
        above.setLevel(before)


def test_the_callbacks_advice_speaks_of_options(capsys):
    with quiet():
        for message in (
            "GradSigns 'wm': the `strength` too low, `GradSigns.logits` ...",
            "The `strength` of another.",
        ):
            warnings.warn_explicit(
                message, UserWarning, "advice.py", 1, module="gradsigns_lightning.integration"
            )
    told = capsys.readouterr().err
    assert "`watermark.strength` too low, `model` ..." in told
    assert "The `strength` of another" in told


def test_an_argument_with_its_value_is_called_by_its_option():
    names = {"n_val_images": "watermark.n_val_images", "download": "data.module.download"}
    assert (
        spoken("`n_val_images=0`, `download=True`", names)
        == "`watermark.n_val_images=0`, `data.module.download=true`"
    )
