"""``import gradsigns_lightning`` and all its names must not import the heavy optional libraries.

Libraries that we depend on may import them if they are installed (torchmetrics imports torchvision), so what
counts is which module imports them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {
    *(
        "wandb",
        "torchvision",
        "hydra",
        "omegaconf",
        "sklearn",
        "matplotlib",
        "onnxruntime",
        "litserve",
        "plotly",
        "rich",
    ),
    *("galois", "rfc3161_client", "requests", "h5py", "PIL"),
}

# Prints what the modules of a package import, each with the importing module.
PROBE = """
import builtins, json, sys
package, imports, original = sys.argv[1], [], builtins.__import__

def recording(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__") or ""
    if importer.split(".")[0] == package:
        imports.append([importer, name])
    return original(name, globals, *args, **kwargs)

builtins.__import__ = recording
module = __import__(package)
for name in getattr(module, "__all__", ()):
    getattr(module, name)
print(json.dumps(imports))
"""


def heavy_imports(package: str, folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, package],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    imports = json.loads(done.stdout.splitlines()[-1])
    assert imports, "the probe saw nothing"
    return [f"{importer} imports {name}" for importer, name in imports if name.split(".")[0] in HEAVY]


def test_no_heavy_library_is_imported():
    assert heavy_imports("gradsigns_lightning", ROOT) == []


@pytest.mark.parametrize("statement", ["import wandb", "from wandb.sdk import x", "import wandb as w"])
def test_the_check_can_fail(tmp_path, statement):
    (tmp_path / "wandb" / "sdk").mkdir(parents=True)
    (tmp_path / "wandb" / "__init__.py").write_text("")
    (tmp_path / "wandb" / "sdk" / "__init__.py").write_text("x = 1")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("from ours import inner")
    (tmp_path / "ours" / "inner.py").write_text(f"import json\n{statement}\n")
    (found,) = heavy_imports("ours", tmp_path)
    assert found.startswith("ours.inner imports wandb")


def test_an_import_inside_a_function_is_allowed(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("import json\ndef use():\n    import wandb\n")
    assert heavy_imports("ours", tmp_path) == []
