"""What is released and how: the sdist's files, ranges and their lowest versions, Python versions, version numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib

import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version
from release import MADE, files_of_the_project, missing_in_sdist, missing_in_wheel, names_in_sdist

import dpo_kernels
from setup import for_an_index

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def pins(name: str) -> dict[str, Version]:
    """Of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0].lower(): Version(line.split("==")[1]) for line in lines if "==" in line}


def lowest(extras: tuple[str, ...]) -> dict[str, Version]:
    """The lower bounds of what the package and these extras need."""
    lines = PROJECT["dependencies"] + [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    needed = [need for need in map(Requirement, lines) if need.name != PROJECT["name"]]
    bounds = {need.name: next(s.version for s in need.specifier if s.operator in (">=", "~=")) for need in needed}
    return {name.lower(): Version(version) for name, version in bounds.items()}


def test_the_sdist_holds_all_that_its_tests_and_docs_read(tmp_path):
    shutil.copytree(
        ROOT, tmp_path / "copy", ignore=lambda folder, names: {n for n in names if n in MADE or n.endswith(".egg-info")}
    )
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv.pop())"
    made = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path / "copy", capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = names_in_sdist(sdist)
    assert not missing_in_sdist(names)
    assert {"train.py", "tests/helpers.py", "tests/conformance/conftest.py", "examples/dpo.jsonl"} <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith((".venv", "build/", "output/"))}


def test_the_description_on_an_index_has_no_links_to_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = for_an_index(readme)
    assert "](docs/" in readme
    assert not re.findall(r"\]\((?![a-z]+:)", told)
    assert "![" not in told
    assert "`docs/memory.md`" in told
    assert for_an_index("[a](https://b.c) [d](#e) [f](g.md#h)\n") == "[a](https://b.c) [d](#e) f (`g.md`)\n"


def test_what_is_missing_is_found():
    names = files_of_the_project()
    assert missing_in_sdist(names - {"train.py"}) == {"train.py"}
    in_wheel = {name for name in names if name.startswith("dpo_kernels/")}
    assert "dpo_kernels/csrc/hidden.cpp" in missing_in_wheel(in_wheel)


def test_every_package_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dpo_kernels").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"dpo_kernels.csrc", "dpo_kernels.examples"}
    assert packages == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_lowest_versions_are_those_of_the_ranges():
    pinned, bounds = pins("constraints-lowest.txt"), lowest(("cpp", "train", "peft", "dev"))
    assert {name: bounds.get(name) for name in pinned} == pinned
    assert lowest(("cpp", "train", "peft")).keys() <= pinned.keys(), "every range has its lowest version tested"


def test_what_make_installs_is_within_the_ranges():
    pinned = pins("constraints.txt")
    for name, extras in PROJECT["optional-dependencies"].items():
        for need in map(Requirement, extras):
            if need.name.lower() in pinned:
                assert need.specifier.contains(pinned[need.name.lower()]), f"{name}: {need}"


def test_python_versions_are_those_that_the_workflow_tests():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    said = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert said == tested
    assert PROJECT["requires-python"] == f">={tested[0]}"
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {step.split()[1] for step in steps if step.startswith("make ")} <= set(targets)


def test_one_version_number():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dpo_kernels.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["cff-version"] == "1.2.0"
