"""docs/edge-semantics.md names the tests that hold it; they are there."""

from __future__ import annotations

import re

from helpers import ROOT


def missing(page: str) -> list[str]:
    """Of `file.py`: `test`, `test`; `file.py`: ... in each row of the table, what is in no such file."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    rows = [line for line in page.splitlines() if ".py`:" in line]
    named = [pair for row in rows for pair in re.findall(r"`(test_\w+\.py)`: ((?:`[\w-]+`(?:, )?)+)", row)]
    pairs = [(file, name) for file, names in named for name in re.findall(r"`([\w-]+)`", names)]
    return [
        f"{file}: {name}" for file, name in pairs
        if f"def {name}(" not in sources.get(file, "") and f'id="{name}"' not in sources.get(file, "")
    ]  # fmt: skip


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs" / "edge-semantics.md").read_text(encoding="utf-8")
    assert page.count(".py`:") > 20
    assert missing(page) == []
    assert missing(page.replace("`test_no_tokens`", "`test_none`")) == ["test_edges.py: test_none"]
