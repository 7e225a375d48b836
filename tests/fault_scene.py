"""A small run of `train.py` that faults are done to, and what they are held to; `faults.py` has the faults."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing.popen_fork
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import datasets
import torch
from helpers import EXAMPLE, ROOT

from dpo_kernels.training import checkpoints
from dpo_kernels.training.small_model import make_small_model

STEPS = 6
SECONDS = 300  # a run that takes longer hangs


class WrongError(AssertionError):
    """A fault was not met as it should be."""


class NotHereError(Exception):
    """This machine does not let the fault be made."""


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last word to the user."""
        said = [line for line in (self.out + self.err).splitlines() if line.startswith(("train.py:", "stopped "))]
        return said[-1] if said else ""


@dataclass
class Process:
    """A run that was started."""

    process: Any  # as subprocess.Popen
    texts: tuple[IO[str], IO[str]]  # what it has said

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self) -> Ended:
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise WrongError("hangs") from None
        texts = []
        for file in self.texts:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(code, *texts)


class _Forked(multiprocessing.popen_fork.Popen):
    """With the names that subprocess has for it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode, self.sentinel, self.finalizer = pid, None, None, None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.001)
        return code


def _fork(argv: list[str], environment: dict[str, str], texts: tuple[IO[str], IO[str]]) -> _Forked:
    """`python ARGV` without the seconds that its imports take, in a process of its own."""
    sys.stdout.flush()
    if pid := os.fork():
        return _Forked(pid)
    code = 1
    try:
        for number, file in enumerate(texts, start=1):
            os.dup2(file.fileno(), number)
        os.environ.update(environment)
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Scene:
    """A folder with a small model, a few pairs, and a run that nothing went wrong with.

    warm: runs are forks of this process, which has done the imports.
    """

    folder: Path
    steps: int = STEPS
    warm: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    began: float = 0.0  # seconds from the start to the log's first appearance, and to the end
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.environment = os.environ | {
            "HF_DATASETS_CACHE": str(self.folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }  # fmt: skip
        if self.warm:
            import matplotlib.pyplot  # noqa: F401  (the last import of a run)

            torch.set_num_threads(1)  # a fork has none of its parent's
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a run hears it, also where nohup started this
        model, tokenizer = make_small_model(EXAMPLE, vocab_size=400, hidden_size=64, layers=1)
        model.save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        lines = EXAMPLE.read_text(encoding="utf-8").splitlines(True)
        (self.folder / "pairs.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
        (self.folder / "others.jsonl").write_text("".join(lines[8:16]), encoding="utf-8")
        start = time.monotonic()
        with self.start(self.straight) as process:
            until((self.straight / "log.jsonl").exists, process)
            self.began = time.monotonic() - start
            done = process.end()
        self.ended = time.monotonic() - start
        if done.code:
            raise WrongError(f"the run without a fault ends with {done.code}: {done.err[-500:]}")

    @property
    def straight(self) -> Path:
        return self.folder / "straight"

    def command(self, output_dir: Path, **options: Any) -> list[str]:
        given = {
            "data_path": self.folder / "pairs.jsonl", "ref_weight": self.folder / "model", "output_dir": output_dir,
            "max_length": 64, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True,
            "max_steps": self.steps, "save_steps": 1, "disable_tqdm": True, "resume_from_checkpoint": "latest",
        } | options  # fmt: skip
        argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return [sys.executable, str(ROOT / "train.py"), *argv]

    def start(
        self,
        output_dir: Path,
        before: Callable[[], None] | None = None,
        cold: bool = False,
        say: str = "",
        **options: Any,
    ) -> Process:
        """Starts a run; it writes into files, not pipes, which would fill.

        Args:
            before: called in a new process, which is then none of this one's.
            cold: no fork, however the others are.
            say: a name for the files of what it says; default: output_dir's.
        """
        texts = tuple(
            (self.folder / f"{say or output_dir.name}.{name}").open("w+", encoding="utf-8") for name in ("out", "err")
        )
        environment = self.environment | options.pop("environment", {})
        command = self.command(output_dir, **options)
        if self.warm and not cold and before is None:
            return Process(_fork(command[1:], environment, texts), texts)
        return Process(
            subprocess.Popen(command, env=environment, stdout=texts[0], stderr=texts[1], preexec_fn=before), texts
        )

    def run(self, output_dir: Path, **options: Any) -> Ended:
        with self.start(output_dir, **options) as process:
            return process.end()

    def half(self, name: str, last: int = 3) -> Path:
        """A run as a kill after this step leaves it: the undisturbed run's first checkpoints."""
        output_dir = self.folder / name
        output_dir.mkdir()
        for path in checkpoints.all_of(self.straight)[:last]:
            shutil.copytree(path, output_dir / path.name)
        return output_dir

    def check_done(self, output_dir: Path) -> None:
        """Weights and losses are those of the undisturbed run, and nothing unfinished lies about."""
        for name in ("model.safetensors", f"checkpoint-{self.steps}/model.safetensors"):
            expect((output_dir / name).is_file(), f"{name} is not there")
            expect(same(output_dir / name, self.straight / name), f"{name} is not the undisturbed run's")
        expect(losses(output_dir) == losses(self.straight), "the log is not the undisturbed run's")
        left = [path.name for path in output_dir.iterdir() if path.name.startswith((".", "_"))]
        expect(not left, f"{left} are left")

    def finish(self, output_dir: Path, **options: Any) -> Ended:
        """The same command, which has to end well now."""
        done = self.run(output_dir, **options)
        expect(done.code == 0, f"the resumed run ends with {done.code}: {done.err[-500:]}")
        self.check_done(output_dir)
        return done


def expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise WrongError(otherwise)


def check(done: Ended, code: int, *said: str) -> None:
    everything = done.out + done.err
    expect("Traceback" not in everything, f"a traceback: {everything[-1500:]}")
    expect(done.code == code, f"ends with {done.code}, expected {code}: {everything[-500:]}")
    for part in said:
        expect(part in everything, f"does not say {part!r}: {everything[-1500:]}")


def happened(done: Ended) -> str:
    return f"{done.code}; {done.sentence}"


def until(condition: Callable[[], bool], process: Process, may_end: bool = False) -> bool:
    """Waits for something that a process does; whether it did."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if condition():
            return True
        if process.process.poll() is not None:
            if may_end:
                return False
            raise WrongError(f"ended too early, with {process.process.returncode}: {process.end().err[-500:]}")
        time.sleep(0.0005)
    raise WrongError("hangs")


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """Of the whole lines of the log."""
    try:
        lines = (output_dir / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines) if "loss" in entry]


def same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def bound_by_modes() -> Callable[[], None] | None:
    """For a child of root: gives up what lets root write where a folder's mode forbids it."""
    if os.geteuid() != 0:
        return None
    libc, drop, capabilities = ctypes.CDLL(None, use_errno=True), 24, (1, 2)  # PR_CAPBSET_DROP; CAP_DAC_*

    def before() -> None:
        for capability in capabilities:
            if libc.prctl(drop, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")

    return before


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small file system; gives what makes it larger."""

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            raise NotHereError(f"no tmpfs can be mounted: {done.stderr.strip()}")

    folder.mkdir()
    mount(f"size={size}")
    try:
        yield lambda larger: mount(f"remount,size={larger}")
    finally:
        subprocess.run(["umount", folder], check=True)
