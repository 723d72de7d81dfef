"""The frameworks' advice stays off the terminal."""

import logging

import pytest

from gradsigns_lightning.cli.quiet import quiet


@pytest.mark.parametrize("package", ["lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"])
def test_lightning_says_nothing_under_any_of_its_names(package):
    above = logging.getLogger(package)
    before = above.level
    above.setLevel(logging.INFO)  # as the package does when it is imported
    try:
        with quiet():
            assert not logging.getLogger(f"{package}.utilities.rank_zero").isEnabledFor(logging.INFO)
    finally:
        above.setLevel(before)
