"""Untrusted JSON."""

import codecs
import subprocess
import sys

import pytest

from gradsigns_lightning.core.utils.canonical import parse_json

BOUNDS = {"max_bytes": 100, "max_values": 10}


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp500"]
)
def test_no_encoding_but_utf8_is_read(encoding):
    with pytest.raises(ValueError, match=r"decode|Expecting"):
        parse_json('{"a": 1}'.encode(encoding), **BOUNDS)


def test_an_encoding_is_not_guessed_by_importing_what_reads_it():
    code = """
import sys
from gradsigns_lightning.core.utils.canonical import parse_json
before = set(sys.modules)
try:
    parse_json(b"\\0\\0\\0[\\0\\0\\0]", max_bytes=100, max_values=10)
except ValueError:
    print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "[]\n"


def test_utf8_is_read_with_its_mark_and_with_lone_surrogates():
    assert parse_json(codecs.BOM_UTF8 + '["Zürich"]'.encode(), **BOUNDS) == ["Zürich"]
    assert parse_json(b'["\xed\xa0\x80"]', **BOUNDS) == ["\ud800"]
