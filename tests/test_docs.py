"""docs/ and the project's papers say what the code does: variables, messages, names, links, commands."""

from __future__ import annotations

import re

import pytest
import yaml
from helpers import ROOT

import dpo_kernels

DOCS = ROOT / "docs"
ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")
SOURCES = [
    path for folder in ("dpo_kernels", "csrc", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".sh")
]  # fmt: skip
PAGES = sorted(DOCS.rglob("*.md"))
PAPERS = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md")]


def navigation() -> list[str]:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["docs_dir"] == "docs"
    entries = [entry for section in config["nav"] for pages in section.values() for entry in pages]
    return [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in entries]


def test_every_environment_variable_is_on_its_page():
    texts = [path.read_text(encoding="utf-8") for path in [*SOURCES, ROOT / "Makefile", ROOT / "train.py"]]
    used = {name for text in texts for name in re.findall(r"\bDPO_KERNELS_[A-Z_]+\b", text)}
    assert set(re.findall(r"`(DPO_KERNELS_[A-Z_]+)`", ERRORS)) == used
    package = [p for p in SOURCES if p.is_relative_to(ROOT / "dpo_kernels")]
    read = {
        name for path in [*package, ROOT / "train.py"]
        for name in re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"(\w+)\"", path.read_text(encoding="utf-8"))
    }  # fmt: skip
    assert len(read) > 5
    assert not {name for name in read if f"`{name}`" not in ERRORS}


def test_the_messages_of_the_page_are_those_of_the_code():
    """Adjacent strings are one message; what a message fills in ends a part that the page quotes."""
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES if path.is_relative_to(ROOT / "dpo_kernels"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    rows = [line for line in ERRORS.split("## Environment variables")[0].splitlines() if line.startswith("| `")]
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(quoted) > 15
    assert [part for part in quoted if part not in code] == []


def test_every_page_is_in_the_navigation():
    names = navigation()
    assert sorted(names) == [path.relative_to(DOCS).as_posix() for path in PAGES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("page", [*PAGES, *PAPERS], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\[[^\[\]]*\]\(([^)\s]+)\)", text):
        assert not target.startswith("/"), target
        if "://" not in target and not target.startswith("#"):
            found = (page.parent / target.split("#")[0]).resolve()
            assert found.exists(), f"{page.name}: {target}"
            assert page in PAPERS or found.is_relative_to(DOCS), f"{page.name}: {target} is no part of the site"


def test_the_api_page_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: dpo_kernels\.(\w+)$", text, re.MULTILINE)
    assert sorted([*names, "reference"]) == sorted(dpo_kernels.__all__)


def test_the_code_of_the_quick_start_runs(capsys):
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quick-start.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert names["hidden"].grad.abs().max() > 0
    assert "8,192 tokens x 4,096 features" in capsys.readouterr().out


def test_the_paths_and_targets_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", text)) <= set(targets)
    paths = re.findall(r"`((?:dpo_kernels|tests|benchmarks|docs)/[\w/.-]*)`", text)
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_issue_templates_are_forms_and_ask_for_the_environment():
    forms = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    }
    for name, form in forms.items():
        assert name == "config.yml" or {"name", "description", "body"} <= form.keys()
    labels = [part["attributes"].get("label", "") for part in forms["bug_report.yml"]["body"]]
    assert "Output of `dpo-kernels env`" in labels


def readme_parts(name):
    """What its translation has too, in the same order: code without comments, links and pictures, figures and units."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    code = [(language, re.sub(r" *#.*", "", block)) for language, block in blocks]
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("README")]
    prose = re.sub(r"\]\([^)\s]+\)", "]", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    names = re.findall(r"`[^`]+`", prose)
    figures = re.findall(r"\d[\d,.]*(?:e-\d+)?(?<![,.])\s?(?:ms|s|MiB|GiB|%)?(?![a-zA-Z])", prose)
    shape = re.findall(r"^(#+|\||-) ", text, re.MULTILINE)
    return code, targets, sorted(names), [" ".join(figure.split()) for figure in figures], shape


def test_the_chinese_readme_has_the_same_code_links_and_figures():
    english, chinese = readme_parts("README.md"), readme_parts("README.zh-CN.md")
    for here, there in zip(english, chinese, strict=True):
        assert here == there
    code, targets, _, figures, _ = english
    assert len(code) == 9
    assert len(targets) > 25
    assert {"151 ms", "3,558 MiB", "13.9 GiB", "90%", "4.6e-7", "117 s"} <= set(figures)


@pytest.mark.parametrize(("name", "other"), [("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")])
def test_the_readmes_lead_to_each_other(name, other):
    assert f"({other})" in (ROOT / name).read_text(encoding="utf-8").split("\n\n")[1]


def test_the_options_of_the_readme_are_those_of_the_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    options = re.findall(r"^\| `--(\w+)` \|", text, re.MULTILINE)
    assert len(options) == 10
    help_page = (ROOT / "dpo_kernels" / "commands" / "help.py").read_text(encoding="utf-8")
    assert [name for name in options if name not in help_page] == []
