"""Optional dependencies: a missing one is reported with its extra, and none is required elsewhere."""

import ast
import re
import sys
from pathlib import Path

import pytest

from gradsigns_lightning.core.utils.optional import require

PACKAGE = Path(sys.modules["gradsigns_lightning"].__file__).parent
# distributions that are not called as their module is, but for "-" instead of "_"
DISTRIBUTIONS = {"PIL": "pillow"}
BROUGHT_ALONG = {("vision", "pillow")}  # torchvision depends on it
# A plugin that Hydra finds by itself, what the notebooks import, and lists of others.
NOT_OURS = {"sweep", "notebook", "all", "dev"}


def extras() -> dict[str, set[str]]:
    """Return the names of the distributions in each extra; Python 3.10 has no tomllib."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"^(\w+) = \[(.*?)\]$", section, re.M | re.S))
    return {name: set(re.findall(r'"([\w-]+)', content)) for name, content in listed.items()}


def required() -> set[tuple[str, str]]:
    """Return module and extra of every call in the package."""
    nodes = (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    calls = (
        node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    )
    return {(call.args[0].value, call.keywords[0].value.value) for call in calls}


def test_every_extra_is_used_and_complete():
    assert {"wandb", "payload", "notebook", "all", "dev"} < set(extras())
    assert {extra for _, extra in required()} == set(extras()) - NOT_OURS
    for module, extra in required():
        package = module.partition(".")[0]
        name = DISTRIBUTIONS.get(package, package.replace("_", "-"))
        assert name in extras()[extra] or (extra, name) in BROUGHT_ALONG


@pytest.mark.parametrize(("module", "extra"), sorted(required()))
def test_what_is_missing_comes_with_the_command_that_installs_it(module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ImportError) as raised:
        require(module, extra=extra)
    assert (
        str(raised.value)
        == f"This needs {package}, which is not installed: pip install 'gradsigns-lightning[{extra}]'."
    )
    assert raised.value.name == package


def test_what_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text("import no_such_library_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError,
        match=r"broken_one, which cannot be imported \(No module named "
        r"'no_such_library_at_all'\)",
    ):
        require("broken_one", extra="vision")


def test_the_command_is_written_in_one_place():
    found = {
        file.name for file in PACKAGE.rglob("*.py") if "pip install 'gradsigns-lightning[" in file.read_text()
    }
    assert found == {"optional.py", "explain.py"}  # the latter for modules that other libraries need
