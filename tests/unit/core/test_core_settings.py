"""The settings of embedding: what they make and refuse, and that they import nothing slow."""

import dataclasses
import math
import subprocess
import sys

import pytest

from gradsigns_lightning.core import Cadence, EmbeddingSettings, StrengthSchedule


def test_numbers_stand_for_schedule_and_cadence():
    assert EmbeddingSettings(strength=2.0).make_schedule() == StrengthSchedule(2.0)
    assert EmbeddingSettings(cadence=3).make_cadence() == Cadence(3)
    assert EmbeddingSettings().make_cadence() == Cadence.following()
    schedule, cadence = StrengthSchedule(0.5, warmup_steps=3), Cadence(2, max_backoff=1)
    settings = EmbeddingSettings(strength=schedule, cadence=cadence)
    assert settings.make_schedule() is schedule
    assert settings.make_cadence() is cadence


def test_they_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EmbeddingSettings().momentum = 0.1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"strength": -1}, ValueError, "`strength`"),
        ({"cadence": 0}, ValueError, "`every_n_steps`"),
        ({"n_images": 0}, ValueError, "`n_images` must be an integer >= 1"),
        ({"momentum": 1}, ValueError, r"`momentum` must be in \[0, 1\), got 1"),
        ({"momentum": math.nan}, ValueError, "`momentum`"),
        ({"momentun": 0}, TypeError, "momentun"),
    ],
)
def test_what_is_out_of_range_is_refused_when_it_is_given(given, error, message):
    with pytest.raises(error, match=message):
        EmbeddingSettings(**given)


def test_a_command_line_has_them_without_torch():
    script = (
        "import sys; from gradsigns_lightning.core.settings import DEFAULTS; assert 'torch' not in "
        "sys.modules; print(DEFAULTS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == str(EmbeddingSettings())
