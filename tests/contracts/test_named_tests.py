"""Every test that a document names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


def named(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


def defined() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    assert named(document.read_text()) <= defined()


def test_documents_name_tests():
    assert {"evidence.md", "threat-model.md"} <= {path.name for path in DOCUMENTS if named(path.read_text())}
    assert named("see `test_no_such_thing_is_here`") - defined()
