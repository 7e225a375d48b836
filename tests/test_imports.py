"""What imports what: the package needs torch alone, and no test file needs another."""

from __future__ import annotations

import ast
import subprocess
import sys

from helpers import ROOT

from dpo_kernels import available_impls


def test_implementations_explain_themselves():
    reasons = available_impls()
    assert set(reasons) == {"triton", "cpp", "torch"}
    assert reasons["torch"] is None
    assert reasons["triton"] is None or "TRITON_INTERPRET=1" in reasons["triton"]
    assert "torch: can run" in str(reasons).splitlines()
    assert "no GPU" in (available_impls("cuda")["triton"] or "no GPU")
    assert "not on meta" in available_impls("meta")["triton"]


def test_importing_needs_torch_alone():
    blocked = ("transformers", "accelerate", "datasets", "triton", "numpy", "matplotlib")
    code = (
        "import sys, torch\n"
        f"before = set(sys.modules)\nimport dpo_kernels\nassert dpo_kernels.plan\nnew = set(sys.modules) - before\n"
        f"assert not new & {set(blocked)!r}, new\n"
        "roots = {name.split('.')[0] for name in new} - set(sys.stdlib_module_names)\n"
        "assert roots <= {'dpo_kernels', 'torch'}, roots\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def imported(source: str) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)}
    return names


def test_no_test_file_imports_another():
    files = sorted(path for path in (ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files if path.name.startswith("test_")}
    assert len(tests) == sum(path.name.startswith("test_") for path in files), "two test files have one name"
    assert len(tests) > 30
    for path in files:
        found = {part for name in imported(path.read_text(encoding="utf-8")) for part in name.split(".")}
        assert not found & (tests | {"conftest"}), path
    assert "test_data" in imported("def f():\n    from test_data import PAIR")
    assert "tests.test_data" in imported("from tests import test_data")
