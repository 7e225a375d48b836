"""What a step costs in each layout: ours, TRL's trainer and a plain loop, the same pairs in the same order, in turn.

python -m benchmarks.layouts                            the example of make train: its model, its pairs
python -m benchmarks.layouts --model M --data pairs.jsonl --max_length 2048 --pairs 4 --steps 6
python -m benchmarks.layouts --made 15000 1400 1400     one pair of so many tokens: prompt, chosen, rejected
python -m benchmarks.layouts --before FOLDER            an older version of this project as a first column
python -m benchmarks.layouts --systems padded shared    some of them

A step is a step of training: policy, reference, loss, backward, optimizer. Each system is a process of its own that
trains on the same tokens and waits while another has its turn; the first step is not counted. It is of the longest
answers, as the rehearsal of a run is: buffers are as large then as they will be. The others are of pairs spread evenly
over the file. Bytes are the most that a process held beyond its two models. Where memory does not hold
all systems at once with room to spare, --alone runs one after the other: a machine that runs out of pages slows those
down that let buffers go in between.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.layout_worker import MARK

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/dpo.jsonl"
SYSTEMS = ("padded", "bucketed", "packed", "shared", "plain", "trl", "mask")


@dataclass
class Measured:
    """Seconds, losses and gradient norms of the steps that count; the most bytes beyond the models; tokens that a step
    gave a model; the layout in words, where the trainer says it."""

    system: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bytes: int = 0
    tokens: list[int] = field(default_factory=list)
    told: str = ""


class Worker:
    """A system in its process."""

    def __init__(self, system: str, given: Sequence[str], package: Path) -> None:
        self.system = system
        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/layout_worker.py"), system, *given]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"PYTHONPATH": str(package)},
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: the process ended; says its last words.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        status = self.process.wait()
        self.errors.seek(0)
        last = "".join(self.errors.readlines()[-5:])
        raise RuntimeError(f"{self.system} ended with status {status}: {last}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a step and a table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a folder with a tokenizer; default: the example's, made on the spot"
    )
    parser.add_argument("--data", type=Path, default=EXAMPLE)
    parser.add_argument("--made", type=int, nargs=3, metavar=("PROMPT", "CHOSEN", "REJECTED"))
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="that count")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS[:-1])
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="its root; it comes first")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--alone", action="store_true", help="one system after the other, instead of in turn")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(options, Path(folder))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


def measured(options: argparse.Namespace, folder: Path) -> list[Measured]:
    """All systems, step by step."""
    if not options.data.is_file():
        raise SystemExit(f"--data is {options.data}, which is no file; give one of pairs, or --made")
    model = options.model or _example_model(folder, options.data)
    items = _made(options) if options.made else _read(options, model)
    torch.save(items, folder / "items.pt")
    given = ["--model", str(model), "--items", str(folder / "items.pt"), "--pairs", str(options.pairs)]
    given += [f"--{name}" for name in ("bf16", "gradient_checkpointing") if getattr(options, name)]
    systems = [*(["before"] if options.before else []), *options.systems]
    turns = [[name] for name in systems] if options.alone else [systems]
    return [row for names in turns for row in _in_turn(names, given, options, items)]


def _in_turn(names: list[str], given: list[str], options: argparse.Namespace, items: list[Any]) -> list[Measured]:
    workers = [Worker(name, given, options.before if name == "before" else ROOT) for name in names]
    rows = [Measured(worker.system, told=worker.hear()["told"]) for worker in workers]
    for step in range(options.steps + 1):
        for worker, row in zip(workers, rows, strict=True):
            said = worker.ask("go")
            if step:  # the first makes buffers and states
                row.seconds.append(said["seconds"])
                row.losses.append(said["loss"])
                row.norms.append(said["norm"])
                row.tokens.append(_tokens(row.system, items[step * options.pairs : (step + 1) * options.pairs]))
        if step:
            last = "  ".join(f"{row.system} {row.seconds[-1]:.2f}" for row in rows)
            print(f"step {step}: {last}", flush=True)
    for worker, row in zip(workers, rows, strict=True):
        row.bytes = worker.ask("end")["most"]
        worker.process.wait()
    return rows


def _example_model(folder: Path, data: Path) -> Path:
    from dpo_kernels.training.small_model import make_small_model

    model, tokenizer = make_small_model(data)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _read(options: argparse.Namespace, model: Path) -> list[Any]:
    """Pairs for a first step, those that count, and one before which all end."""
    from transformers import AutoTokenizer

    from dpo_kernels.training import DPODataset
    from dpo_kernels.training.data_report import column

    dataset = DPODataset(options.data, AutoTokenizer.from_pretrained(model), options.max_length)
    wanted = (options.steps + 2) * options.pairs
    if len(dataset) < wanted:
        raise SystemExit(
            f"{options.data} has {len(dataset)} pairs, and {wanted} are asked for: fewer --steps or --pairs"
        )
    groups = len(dataset) // options.pairs
    starts = [i * groups // (options.steps + 2) * options.pairs for i in range(1, options.steps + 2)]
    counted = column(dataset.rows, "counted")
    longest = sorted(range(len(dataset)), key=lambda i: -counted[i])[: options.pairs]
    return [dataset[i] for i in (*longest, *(start + i for start in starts for i in range(options.pairs)))]


def _made(options: argparse.Namespace) -> list[Any]:
    """Random tokens, the same lengths each step."""
    prompt, *answers = options.made
    generator, items = torch.Generator().manual_seed(0), []
    for _ in range((options.steps + 2) * options.pairs):
        item: dict[str, Any] = {}
        start = torch.randint(100, 500, (prompt,), generator=generator)
        for side, length in zip(("chosen", "rejected"), answers, strict=True):
            whole = torch.cat([start, torch.randint(100, 500, (length,), generator=generator)])
            whole = torch.nn.functional.pad(whole, (0, max(answers) - length))
            place = torch.arange(1, len(whole))
            counts = (place >= prompt) & (place < prompt + length)
            item |= {f"x_{side}": whole[:-1], f"y_{side}": whole[1:].where(counts, torch.tensor(-100)),
                     f"mask_{side}": counts}  # fmt: skip
        items.append(item)
    return items


def _tokens(system: str, items: list[Any]) -> int:
    """Tokens that a model is given in a step."""
    from dpo_kernels.training import PairCollator
    from dpo_kernels.training.batch import PairBatch
    from dpo_kernels.training.layouts import Layout

    name = {"mask": "shared", "before": "padded"}.get(system, system)
    ends = 2 * len(items) if name in ("plain", "trl") else 0  # they run the last token too, which predicts nothing
    layout = Layout("padded" if ends else name, "branches" if name in ("packed", "shared") else None)
    return PairBatch(PairCollator()(items), layout).positions + ends


def table(rows: Sequence[Measured]) -> str:
    """Markdown: a row a system, its seconds and bytes beside those of the first."""
    first = rows[0]
    lines = [
        f"| | s a step | x {first.system} | of each step | tokens a step | GiB beyond models |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        share = sum(row.seconds) / sum(first.seconds)
        told = f" ({row.told})" if row.told not in ("", row.system) and row.system != "before" else ""
        each = " ".join(f"{a / b:.2f}" for a, b in zip(row.seconds, first.seconds, strict=True))
        lines.append(
            f"| {row.system}{told} | {fmean(row.seconds):.2f} | {share:.3f} | {each} | {fmean(row.tokens):,.0f} | "
            f"{row.bytes / 2**30:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
