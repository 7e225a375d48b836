"""The file of one run: rows, machine, versions, date. It is a section of what `--benchmark-json` writes."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row

SECTION = "dpo_kernels"
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "dpo-kernels",
)  # fmt: skip


@dataclass
class Results:
    """One run. size: "small" or "real".

    threads: PyTorch's, and how they wait where that is set. commit: of the checkout, "+" where it was modified.
    """

    date: str
    size: str
    machine: str
    threads: str
    versions: dict[str, str]
    commit: str
    rows: list[Row]

    @property
    def name(self) -> str:
        """Machine and date, as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.machine} {self.date}".lower()).strip("-")

    def to_json(self, samples: bool = False) -> dict[str, Any]:
        """samples: with every single time; the committed files go without."""
        section = asdict(self)
        for row in section["rows"]:
            if not samples:
                del row["samples"]
            for key in [k for k, v in row.items() if v in (None, "", [], {})]:
                del row[key]
        return section


def of_this_run(rows: Sequence[Row], size: str, device: torch.device) -> Results:
    return Results(
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        size, machine(device), threads(), versions(), commit(), list(rows),
    )  # fmt: skip


def load(path: Path) -> Results:
    """From `--benchmark-json`'s file or from a committed one.

    Raises:
        ValueError: the file holds no run of these benchmarks.
    """
    content = json.loads(path.read_text())
    if SECTION not in content:
        raise ValueError(f"{path} has no section {SECTION!r}: it was not written by `pytest benchmarks/`")
    section = content[SECTION]
    return Results(**{**section, "rows": [Row(**row) for row in section["rows"]]})


def save(results: Results, path: Path) -> None:
    """One row a line: a committed file stays small, and a diff of two readable."""
    section = results.to_json()
    rows = ",\n".join("  " + json.dumps(row) for row in section.pop("rows"))
    head = json.dumps(section)[:-1]
    path.write_text(f'{{"{SECTION}": {head}, "rows": [\n{rows}\n]}}}}\n')


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"1 {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} cores"


def threads() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY")
    return f"{torch.get_num_threads()} threads" + (f" (OMP_WAIT_POLICY {policy})" if policy else "")


def versions() -> dict[str, str]:
    """Of Python and of those PACKAGES that are installed."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version()} | found


def commit() -> str:
    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
