"""Every example of docs/data.md is read, as the format under whose heading it stands."""

from __future__ import annotations

import json
import re

import pytest
from helpers import ROOT

from dpo_kernels.training import ReadOptions
from dpo_kernels.training.formats import FORMATS, read_line

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [
    (heading, line)
    for heading, text in re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize(("heading", "line"), EXAMPLES)
def test_an_example(heading, line):
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"} if heading.startswith("Columns") else {}
    read = read_line(json.loads(line), ReadOptions(columns=columns))
    assert read.unused == ()
    if heading not in ("Columns of other names", "Messages"):
        assert read.format.split()[0].lower() == heading.split("'")[0].split(",")[0].split()[0].lower()


def test_every_format_has_an_example():
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    named = {"Columns of other names": columns}
    found = {read_line(json.loads(x), ReadOptions(columns=named.get(heading, {}))).format for heading, x in EXAMPLES}
    assert found == {form.name for form in FORMATS}
