"""The private packages, from the lowest: none imports one above it."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import wnjax

ROOT = Path(wnjax.__file__).parent
ORDER = ["_leaves", "_axes", "_analysis", "_rewriting", "_transforms", "_optimizers", "_modules"]


def imported(path):
    """The packages and modules of wnjax that a file imports, at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wnjax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "wnjax":
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_down(package):
    below = ORDER[: ORDER.index(package) + 1]
    for path in sorted((ROOT / package).glob("*.py")):
        assert set(imported(path)) <= set(below), path


def test_every_private_package_has_its_place():
    assert {path.name for path in ROOT.iterdir() if path.name.startswith("_")} - {
        "__init__.py",
        "__pycache__",
    } == set(ORDER)


def test_printing_does_not_load_the_analysis():
    """`summary` is used where nothing is traced."""
    code = """
import sys, types
package = types.ModuleType("wnjax"); package.__path__ = [sys.argv[1]]
sys.modules["wnjax"] = package
import wnjax._transforms.inspect
print([name for name in sys.modules if name.startswith(("wnjax._analysis", "wnjax._rewriting"))])
"""
    assert importlib.util.find_spec("wnjax._analysis")
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
