"""The mean image of a released model is a file of numbers."""

import pytest

from gradsigns_lightning.cli.import_2021 import _mean_image


@pytest.mark.parametrize("header", ["(" * 9000, "{'descr':", "\0", "1+" * 9000])
def test_a_mean_image_whose_header_cannot_be_read_is_named(header, tmp_path):
    line = header.encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + len(line).to_bytes(2, "little") + line + bytes(64))
    with pytest.raises(ValueError, match=r"`mean_image` must name a \.npy file of numbers"):
        _mean_image(str(tmp_path / "a.npy"))
