"""One run: its rows, machine, versions and date, and its file, a section of what `--benchmark-json` writes."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import MIB, Case

SECTION = "dpo_kernels"
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "dpo-kernels"
)  # fmt: skip
# How often logits go through memory, by mode: of a peer, and of the floor, whose copies read and write.
PASSES = {"score": (1, 2), "full": (3, 4)}


@dataclass
class Row:
    """What is known of one peer in one case.

    status: "timed"; "floor"; "memory" (measured alone); "wrong"; "failed" (it was tried, and raised); "unavailable" (it
    cannot be tried here). The last three have a reason, and no time.
    seconds: median over `rounds` interleaved rounds, `quartiles` their first and third quartile; `samples` all of them.
    to_floor, to_ours: medians of the ratios within the same round, this peer's time over the other's.
    bytes: held at the second step's peak beyond the inputs, gradients included; first_bytes: at the first step's, with
    what libraries take once; a reason where they could not be measured. returned_bytes: outputs and gradients.
    predicted_bytes: what dpo_kernels plans to hold beyond inputs and those; library_bytes: the part of it that is an
    allowance for libraries and threads.
    mode, gemms: the plan's, for ours; for all others gemms is what the case needs.
    errors, allowed: against float64; log_probs and loss absolute (the largest), gradients relative (Frobenius norm).
    missing_cores: those that other processes took while it was timed, see `busy`.
    """

    case: Case
    peer: str
    status: str
    reason: str = ""
    marks: list[str] = field(default_factory=list)
    seconds: float | None = None
    quartiles: list[float] = field(default_factory=list)
    rounds: int = 0
    to_floor: float | None = None
    to_ours: float | None = None
    bytes: int | None = None
    first_bytes: int | None = None
    bytes_reason: str = ""
    returned_bytes: int | None = None
    predicted_bytes: int | None = None
    library_bytes: int | None = None
    mode: str = ""
    gemms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    missing_cores: float | None = None

    def fail(self, status: str, reason: str) -> None:
        """It has a reason now, and no time."""
        self.status, self.reason = status, reason
        self.seconds = self.to_floor = self.to_ours = None
        self.quartiles, self.samples, self.rounds = [], [], 0

    def beyond(self, peak: int | None) -> int | None:
        """Of a peak, what is beyond inputs, outputs and gradients: what a budget is about."""
        return None if peak is None else peak - (self.returned_bytes or 0)

    @property
    def to_own_gemms(self) -> float | None:
        """The time over that of as many bare products as this plan makes, where to_floor counts what the task needs."""
        if not (self.mode and self.gemms and self.to_floor):
            return None
        return self.to_floor * self.case.needed_gemms / self.gemms

    @property
    def moved(self) -> int:
        """Bytes that must go through memory, of logits and copies."""
        if self.peer == "a large copy":
            return 2 * self.case.copied
        if self.case.level != "logits":
            return 0
        passes = PASSES[self.case.mode][self.status == "floor"]
        return passes * self.case.tokens * self.case.vocab_size * self.case.torch_dtype.itemsize


@dataclass
class Results:
    """One run. size: a name of `cases.SIZES`.

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
        return re.sub(r"[^a-z0-9]+", "-", f"{self.machine} {self.date}".lower()).strip("-")

    def to_json(self, samples: bool = False) -> dict[str, Any]:
        """Without empty fields, and without single times unless they are asked for."""
        rows = [
            {k: v for k, v in asdict(row).items() if v not in (None, "", [], {}) and (samples or k != "samples")}
            for row in self.rows
        ]
        return vars(self) | {"rows": rows}


def of_this_run(rows: list[Row], size: str, device: torch.device) -> Results:
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    threads, policy = f"{torch.get_num_threads()} threads", os.environ.get("OMP_WAIT_POLICY")
    threads += f" (OMP_WAIT_POLICY {policy})" if policy else ""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()} | {p: installed[p] for p in PACKAGES if p in installed}
    return Results(today, size, machine(device), threads, versions, commit(), rows)


def load(path: Path) -> Results:
    """From `--benchmark-json`'s file or from a committed one.

    Raises:
        ValueError: the file holds no run of these benchmarks.
    """
    content = json.loads(path.read_text())
    if SECTION not in content:
        raise ValueError(f"{path} has no section {SECTION!r}: it was not written by `pytest benchmarks/`")
    section = content[SECTION]
    rows = [Row(**{**row, "case": Case(**row["case"])}) for row in section["rows"]]
    return Results(**{**section, "rows": rows})


def save(results: Results, path: Path, samples: bool = False) -> None:
    """One row a line: a committed file, which has no samples, stays small, and a diff of two readable."""
    section = results.to_json(samples)
    write_whole(path, f'{{"{SECTION}": {one_a_line("rows", section.pop("rows"), section)}}}\n')


def write_whole(path: Path, text: str) -> None:
    """The file is the old or the new one at every moment, whenever this process is killed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def one_a_line(name: str, rows: Iterable[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The JSON of facts and, as their last member, rows."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{json.dumps(facts)[:-1]}, "{name}": [\n{lines}\n]}}'


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"1 {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} cores"


def commit() -> str:
    command = ("git", "describe", "--always", "--exclude=*", "--dirty=+")
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


LEVELS = ("logits", "hidden", "dpo", "train")


def case_names(rows: Iterable[Row]) -> list[str]:
    """Each case once, from logits to training."""
    levels = {row.case.name: LEVELS.index(row.case.level) for row in rows}
    return sorted(levels, key=levels.__getitem__)


def is_ours(peer: str) -> bool:
    return peer.startswith("dpo_kernels")


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A column whose name ends with a colon is aligned to the right."""
    heads = [name.rstrip(":") for name in names]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "".join("---:|" if name.endswith(":") else "---|" for name in names))
    return "\n".join(lines)


def mib(size: int | None, digits: int = 0) -> str:
    return "" if size is None else f"{size / MIB:,.{digits}f} MiB"
