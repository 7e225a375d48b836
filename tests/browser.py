"""Opens report.html in a headless browser and takes four pictures of it: narrow and wide, light and dark.

    python tests/browser.py OUT/report.html PICTURES

Each has to be drawn, in the colours of its theme, and no wider than its window. Needs Chromium, Chrome or Edge; the
suite itself looks at the page with a parser, which needs none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.image import imread

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
WIDTHS = {"narrow": 500, "wide": 1280}  # a headless Chromium has no window below 500
THEMES = {"light": 1, "dark": 0}  # as Blink numbers them
HEIGHT = 2400


def browser() -> str:
    """
    Raises:
        FileNotFoundError: there is none.
    """
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"no browser found; install one of {', '.join(BROWSERS)}")


def take(page: Path, target: Path, width: int, theme: str) -> np.ndarray:
    """A picture of a page, (HEIGHT, width, channels) in [0, 1]."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={THEMES[theme]}",
             f"--window-size={width},{HEIGHT}", f"--screenshot={target}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=180,
        )  # fmt: skip
    return imread(target)[..., :3]


def check(picture: np.ndarray, width: int, theme: str) -> None:
    """The page's ground has the theme's brightness, something stands on it, and nothing is cut at the right edge."""
    ground = picture[3, 3]
    assert (ground.mean() > 0.9) == (theme == "light"), f"the ground of the {theme} page is {ground}"
    drawn = np.abs(picture - ground).max(-1) > 0.05
    assert picture.shape[1] == width
    assert drawn.mean() > 0.02, "hardly anything is drawn"
    assert not drawn[:, -5:].any(), "something reaches beyond the window"


def main(page: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for size, width in WIDTHS.items():
        for theme in THEMES:
            target = folder / f"{size}-{theme}.png"
            check(take(page, target.absolute(), width, theme), width, theme)
            print(f"{target}: as it should be")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
