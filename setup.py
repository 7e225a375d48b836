"""What pyproject.toml cannot say: the description that an index shows, where README's links to files lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

FILE = r"\((?![a-z]+:|#)([^)#]*)[^)]*\)"  # no address, no place on the page itself
PICTURE = re.compile(rf"^!\[[^\]]*\]{FILE}\n+(\*[^*]+\*\n+)?", re.MULTILINE)  # with what is said of it in italics
LINK = re.compile(rf"\[([^\]]+)\]{FILE}")


def for_an_index(readme: str) -> str:
    """README without the pictures that are files, and with the names of files in place of links to them."""
    return LINK.sub(lambda link: f"{link[1]} (`{link[2]}`)", PICTURE.sub("", readme))


if __name__ == "__main__":
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=for_an_index(text), long_description_content_type="text/markdown")
