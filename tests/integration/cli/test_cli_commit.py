"""`gradsigns commit` writes all of its files or none, and prints a command that checks the stamp."""

import shlex
import subprocess
import time
from pathlib import Path

import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.cli.commit import read_bytes
from gradsigns_lightning.core.utils import files
from gradsigns_lightning.evidence import load_signer

pytest.importorskip("rfc3161_client")
FILES = ["a key.commitment.json", "a key.commitment.pem", "a key.commitment.tsq"]


@pytest.fixture
def key():
    key = WatermarkKey.generate("Acme", 32, input_shape=(1, 8, 8), target_class=0, secret=bytes(32))
    key.save("a key.gskey")
    return "key='a key.gskey'"


def commitments():
    return sorted(path.name for path in Path().glob("*commitment*"))


def test_the_printed_line_checks_the_stamp_when_the_certificate_has_expired(make_authority, key, capsys):
    authority = make_authority(valid=(-60, 8))
    made = time.monotonic()
    assert main(["commit", key]) == 0
    Path("reply").write_bytes(authority.stamp(Path("a key.commitment.tsq").read_bytes()))
    attach = ["commit", key, "attach=reply", f"authority={authority.certificates}"]
    assert main(attach) == 0
    time.sleep(max(0, 9.5 - (time.monotonic() - made)))
    capsys.readouterr()
    assert main(attach) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "openssl" in line]
    words = shlex.split(line)
    assert subprocess.run(words, capture_output=True).returncode == 0
    at = words.index("-attime")
    # expired, as the test wants it
    assert subprocess.run(words[:at] + words[at + 2 :], capture_output=True).returncode == 1


@pytest.mark.parametrize("first", FILES)
def test_nothing_is_left_beside_a_file_of_somebody_else(key, first, monkeypatch, capsys):
    """The other process's file appears after the checks."""
    original = files.tempfile.mkstemp

    def mkstemp(**options):
        Path(first).write_text("of somebody else")
        return original(**options)

    monkeypatch.setattr(files.tempfile, "mkstemp", mkstemp)
    assert main(["commit", key]) == 1
    assert f"`out` must not name an existing file, got '{first}'" in capsys.readouterr().err
    assert commitments() == [first]
    assert Path(first).read_text() == "of somebody else"


def test_a_signer_serves_several_commitments_and_no_other_takes_its_place(key, capsys):
    assert main(["commit", key]) == 0
    assert main(["commit", key, "signer='a key.commitment.pem'", "out=b.commitment.json"]) == 0
    signers = [load_signer(Path(f"{name}.commitment.pem").read_bytes()) for name in ("a key", "b")]
    assert signers[0].private_bytes_raw() == signers[1].private_bytes_raw()
    assert main(["commit", key, "out=c.commitment.json"]) == 0
    for name in ("c.commitment.json", "c.commitment.tsq"):
        Path(name).unlink()
    before = commitments()
    assert main(["commit", key, "signer='a key.commitment.pem'", "out=c.commitment.json"]) == 1
    assert "`signer` must be the one in 'c.commitment.pem'" in capsys.readouterr().err
    assert commitments() == before


def test_files_that_are_too_large_are_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(ValueError, match="`authority` must name a file of at most 16777216 bytes"):
        read_bytes(tmp_path / "large", "authority")
