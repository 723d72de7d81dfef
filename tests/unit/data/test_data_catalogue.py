"""The data sets that a checkpoint may name."""

from __future__ import annotations

import re

import pytest
import torch

from gradsigns_lightning.data import Digits
from gradsigns_lightning.data.catalogue import shipped_data


def test_digits_need_no_files(tmp_path):
    assert torch.equal(
        shipped_data("digits", tmp_path / "nowhere").raw_images("test", 3), Digits().raw_images("test", 3)
    )


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_other_data_sets_are_looked_for_in_the_given_folder_and_not_downloaded(name, tmp_path):
    with pytest.raises(ValueError, match=rf"`root` must hold .*root={re.escape(str(tmp_path))}"):
        shipped_data(name, tmp_path).raw_images("test", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["image_folder", "ytf", "../evil", "/etc/passwd", "data@x", "digits,mnist", "", "x" * 10**6, "Digits"],
)
def test_what_else_is_named_needs_the_users_word(name, tmp_path):
    with pytest.raises(ValueError, match=r"`checkpoint` names the data .* `images=FOLDER`") as error:
        shipped_data(name, tmp_path)
    assert len(str(error.value)) < 400
