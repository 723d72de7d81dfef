"""Nothing in the package unpickles: a foreign key file or checkpoint must not run code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gradsigns_lightning"
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError", "pickle.PickleError", "pickle.PicklingError"}


def unsafe(source: str) -> list[str]:
    """Statements of ``source`` that unpickle or could; ``import pickle`` is allowed for its errors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = [
                a.name
                for a in node.names
                if a.name.split(".")[0] in PICKLERS and (a.name != "pickle" or a.asname)
            ]
            found += [f"{node.lineno}: import {name}" for name in bad]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] in PICKLERS
        ):
            found.append(f"{node.lineno}: from {node.module} import ...")
        elif (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "pickle"
            and ast.unparse(node) not in HARMLESS
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            found += unsafe_call(node)
    return found


def unsafe_call(node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if (
        called in {"torch.load", "torch.hub.load_state_dict_from_url"}
        and keywords.get("weights_only") is not True
    ):
        return [f"{node.lineno}: {called} without weights_only=True"]
    if keywords.get("weights_only") is False or keywords.get("allow_pickle") is True:
        return [f"{node.lineno}: {called} that unpickles"]
    return []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_unpickles(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.Unpickler(f).load()",
        "import pickle\nclass U(pickle.Unpickler):\n    pass",
        "import pickle\nclass U(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise "
        "ValueError",
        "import json, pickle as p",
        "import dill",
        "from pickle import loads",
        "def f():\n    import joblib",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "Model.load_from_checkpoint('x', weights_only=False)",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_search_finds(source):
    assert len(unsafe(source)) == 1


@pytest.mark.parametrize(
    "source", ["torch.load('x', weights_only=True)", "np.load('x')", "from .pickle import x", "json.load(f)"]
)
def test_the_search_allows(source):
    assert unsafe(source) == []
