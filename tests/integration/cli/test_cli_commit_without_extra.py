"""`gradsigns commit` without a time-stamp authority needs no extra package."""

import sys
from pathlib import Path

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main


def test_a_commitment_needs_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    WatermarkKey.generate("Acme", 32, input_shape=(1, 8, 8), target_class=0).save("a.gskey")
    assert main(["commit", "key=a.gskey"]) == 0
    assert sorted(path.name for path in Path().glob("a.commitment*")) == [
        "a.commitment.json",
        "a.commitment.pem",
    ]
    assert "gradsigns-lightning[evidence]" in capsys.readouterr().out


def test_checking_a_reply_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    WatermarkKey.generate("Acme", 32, input_shape=(1, 8, 8), target_class=0).save("a.gskey")
    assert main(["commit", "key=a.gskey"]) == 0
    Path("reply").write_bytes(b"x")
    assert main(["commit", "key=a.gskey", "attach=reply", "authority=reply"]) == 1
    assert "gradsigns-lightning[evidence]" in capsys.readouterr().err
