"""`dpo-kernels env`: what an issue report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_kernels import __version__
from dpo_kernels.commands.simple import Parser

PACKAGES = ("torch", "triton", "ninja", "numpy", "transformers", "accelerate", "datasets", "tokenizers", "safetensors",
            "peft", "bitsandbytes", "trl", "liger-kernel", "matplotlib", "rich")  # fmt: skip


def main(argv: list[str], program: str) -> int:
    """Prints a line a fact; what cannot be found out says why."""
    Parser(program, "Prints versions, devices, implementations and why one cannot run.").parse_args(argv)
    found = list(facts())
    width = max(len(name) for name, _ in found)
    for name, text in found:
        print(f"{name:<{width}}  {text}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """What there is on this machine, name and text."""
    yield "dpo_kernels", f"{__version__} in {Path(__file__).resolve().parents[1]}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield name, _version(name)
    try:
        import torch
    except ImportError as error:  # a broken installation is what a report is about
        yield "devices", f"torch cannot be imported: {error}"
        return
    cpu = torch.backends.cpu.get_cpu_capability()
    yield "CPU", f"{_model_of_cpu()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "GPUs", ", ".join(_gpus()) or f"none (torch {torch.__version__}, built for CUDA {torch.version.cuda})"
    yield from _implementations()
    for name in sorted(n for n in os.environ if n.startswith(("DPO_KERNELS_", "OMP_", "TRITON_"))):
        yield name, os.environ[name]


def _implementations() -> Iterator[tuple[str, str]]:
    import torch

    from dpo_kernels import available_impls, build
    from dpo_kernels.dispatch import BACKENDS

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        reasons = available_impls(device)
        fastest = next((name for name, reason in reasons.items() if reason is None), "")
        for name, reason in reasons.items():
            first = ", the one that is taken where none is asked for" if name == fastest else ""
            yield f"impl {name} on {device}", f"can run{first}" if reason is None else f"cannot run: {reason}"
    if available_impls("cpu")["cpp"] is None:
        widened = torch.bfloat16 in BACKENDS["cpp"].capabilities(torch.device("cpu"), None).widens
        yield "bfloat16 on cpu", "multiplied in float32" if widened else "multiplied in bfloat16"
    yield "compiler", _asked(lambda: " ".join(build.compiler()))
    yield "C++ kernels", _asked(lambda: f"{'built' if build.cached_library().exists() else 'not built yet'}: "
                                        f"{build.cached_library()}")  # fmt: skip


def _asked(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except (RuntimeError, OSError) as error:  # a BuildError is one
        return f"cannot be built: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    import torch

    return [
        f"{p.name} ({p.total_memory / 2**30:.0f} GiB)"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _model_of_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
