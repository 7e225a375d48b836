"""Arrows go one way: which file of dpo_kernels may import which. docs/architecture.md draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo_kernels"

# From the bottom to the top. A file may import what lies below it, and its own layer where `inside` says so.
LAYERS = (
    ("vocab_shard", "splits", "layout", "warn", "units"),
    ("call",),
    ("statistics", "capabilities"),
    ("workload",),
    ("overrides", "reference", "planner", "build", "collectives", "host_memory"),
    ("kernels", "backends.base"),
    ("sparse", "gathering", "settling"),
    ("driver", "backends.pytorch", "backends.triton_state"),
    ("backends.triton_tiles",),
    ("backends.triton_fused",),
    ("backends.cpp", "backends.triton", "backends"),
    ("dispatch",),
    ("checks", "dtensors"),
    ("ops",),
    ("flops",),
    ("functional",),
    ("losses",),
    ("preference_losses",),
    ("integrations", "training"),
    ("commands",),
    ("__main__",),
)
INSIDE = {"kernels", "losses", "integrations", "training", "commands"}  # folders whose files import each other
LOSSES = ("pairs", "registry", "options", "formulas", "api")  # their own order, from the bottom


def modules() -> dict[str, Path]:
    """Name inside the package -> file; the package itself, which names what is public, is not one of them."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it but under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            short = name.removeprefix("dpo_kernels.")
            if name.startswith("dpo_kernels.") and short in known:
                found.add(short)
    return found


def layer_of(name: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(name == entry or name.startswith(entry + ".") for entry in layer if entry != "backends"):
            return number
        if "backends" in layer and name == "backends":
            return number
    raise AssertionError(f"{name} is in no layer: say in LAYERS what it may import")


GRAPH = {name: imports(path, set(modules())) for name, path in modules().items()}


@pytest.mark.parametrize("name", GRAPH)
def test_a_file_imports_what_lies_below_it(name):
    for other in GRAPH[name] - {name}:
        same_folder = name.split(".")[0] == other.split(".")[0] and name.split(".")[0] in INSIDE
        assert same_folder or layer_of(other) < layer_of(name), f"{name} imports {other}, which is not below it"


def test_no_circle():
    """Also inside a folder."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in GRAPH[name] - {name}:
                if not is_folder_of(other, name):
                    visit(other, (*above, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def is_folder_of(folder: str, name: str) -> bool:
    """A folder's __init__ names what its files make: importing a file runs it anyway."""
    return name.startswith(folder + ".")


def test_the_losses_have_an_order_of_their_own():
    for number, name in enumerate(LOSSES):
        above = {f"losses.{other}" for other in LOSSES[number + 1 :]}
        assert not GRAPH[f"losses.{name}"] & above, f"losses/{name}.py imports from above"


def test_what_computes_log_probs_knows_no_loss():
    below = [name for name in GRAPH if layer_of(name) < layer_of("losses")]
    assert not any(other.split(".")[0] in ("losses", "preference_losses") for name in below for other in GRAPH[name])


def test_a_planted_circle_is_found(monkeypatch):
    monkeypatch.setitem(GRAPH, "call", {"driver"})
    with pytest.raises(AssertionError, match="a circle: "):
        test_no_circle()
    with pytest.raises(AssertionError, match="call imports driver, which is not below it"):
        test_a_file_imports_what_lies_below_it("call")
