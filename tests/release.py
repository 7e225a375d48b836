"""What a release has to hold: the files of sdist and wheel, and an installed wheel that imports and computes.

    python tests/release.py dist            the example is trained for two steps
    python tests/release.py dist --whole    as a stranger would: everything from the index, the example to its end

dist: a folder with one sdist and one wheel. The wheel is installed in a new environment and used from an empty folder.
Without --whole its dependencies are not installed, and those of this interpreter are found. Each command is printed
with its seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders that are made here and are no part of the project.
MADE = {
    ".git", ".venv", "build", "dist", "output", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache",
    ".hypothesis", ".benchmarks", ".cache",
}  # fmt: skip
MADE_FILES = (".pyc", ".so", ".part", ".coverage", "results.json")
USE = """
import pathlib, sys
import torch, dpo_kernels
from dpo_kernels.build import CHECKOUT, INSTALLED
package = pathlib.Path(dpo_kernels.__file__).parent
assert package.is_relative_to(sys.prefix), f"imported from {package}"
assert (INSTALLED / "hidden.cpp").exists() and (package / "py.typed").exists()
hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
log_probs = dpo_kernels.hidden_to_log_probs(hidden, weight, torch.arange(4), impl="torch")
exact = (hidden @ weight.T).log_softmax(-1).diagonal()
torch.testing.assert_close(log_probs, exact)
import dpo_kernels.training, dpo_kernels.integrations
print(f"dpo_kernels {dpo_kernels.__version__} of the wheel imports and computes")
"""


def files_of_the_project(root: Path = ROOT) -> set[str]:
    """Paths of all that is the project's own, from a checkout or an unpacked sdist."""
    found = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in MADE and not name.endswith(".egg-info")]
        parts = [Path(folder, name) for name in names if not name.endswith(MADE_FILES)]
        found |= {path.relative_to(root).as_posix() for path in parts if not path.is_symlink()}
    return found - {".git", ".venv", "PKG-INFO", "setup.cfg"}


def names_in_sdist(path: Path) -> set[str]:
    """Without the folder that they lie in."""
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


def names_in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def missing_in_sdist(names: Iterable[str]) -> set[str]:
    return files_of_the_project() - set(names)


def missing_in_wheel(names: Iterable[str]) -> set[str]:
    """Every module of the package and every C++ source."""
    project = files_of_the_project()
    wanted = {name for name in project if name.startswith("dpo_kernels/")}
    wanted |= {f"dpo_kernels/{name}" for name in project if name.startswith("csrc/")}
    return wanted - set(names)


def use(wheel: Path, whole: bool) -> None:
    """Installs a wheel in a new environment, and uses it there from an empty folder; see the module."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder, "environment"), Path(folder, "empty")
        empty.mkdir()
        venv.create(environment, with_pip=True)
        python, command = environment / "bin" / "python", environment / "bin" / "dpo-kernels"
        (site,) = environment.glob("lib/python*/site-packages")

        def run(*arguments: str | Path) -> None:
            told = " ".join(str(part).replace(f"{folder}/", "") for part in arguments if part != USE)
            print(f"$ {told}", flush=True)
            begin = time.monotonic()
            subprocess.run(arguments, check=True, cwd=empty, env=variables)
            print(f"({time.monotonic() - begin:.1f} s)\n", flush=True)

        pip, short = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"), ()
        if whole:
            run(*pip, f"{wheel.resolve()}[train]")
        else:
            run(*pip, "--no-deps", "--no-index", wheel.resolve())
            (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
            short = ("--lesson_epochs", "1", "--max_steps", "2")
        run(python, "-c", USE)
        run(command, "env")
        run(command, "train", "--output_dir", "out", *short)
        run(command, "compare", "--before", "out/before", "--after", "out")
        pairs = site / "dpo_kernels" / "examples" / "dpo.jsonl"
        run(command, "score", pairs, "--model", "out", "--ref", "out/before", "--output", "scores.jsonl")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args(argv)
    folder = given.dist
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    for path, missing in (
        (sdist, missing_in_sdist(names_in_sdist(sdist))), (wheel, missing_in_wheel(names_in_wheel(wheel)))
    ):  # fmt: skip
        if missing:
            sys.exit(f"{path} lacks {sorted(missing)}")
        print(f"{path.name}: complete, {path.stat().st_size:,} bytes")
    use(wheel, given.whole)


if __name__ == "__main__":
    main(sys.argv[1:])
