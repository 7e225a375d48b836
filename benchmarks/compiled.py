"""Kernels of the package, compiled ahead for chips that are not here.

A launch is recorded instead of made, and compiled as the runtime would specialise it: integers that are 1 or divisible
by 16, aligned pointers, tensor descriptors. Must run in a process in which kernels are not interpreted.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_kernels.kernels import configs
from dpo_kernels.kernels.launch import kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLAGS = (
    "BIASED", "CAPPED", "SAVE", "ONE_BASE", "MARK", "MASK", "BY_VOCAB", "INDEXED", "DESCRIPTORS", "SPECIALIZED",
)  # fmt: skip
GLUON = ("hopper",)  # modules
ROWS = ("accumulate_kernel", "fold_kernel", "exps_kernel", "gradient_kernel", "saved_kernel", "rebase_kernel")


class Target(NamedTuple):
    gpu: GPUTarget
    arch: configs.Arch
    shared: int  # bytes that a block can have
    product: str  # the tensor cores' instruction


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), configs.Arch("cuda", 8), 163 * 1024, "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), configs.Arch("cuda", 8), 99 * 1024, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), configs.Arch("cuda", 9), 227 * 1024, "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), configs.Arch("cuda", 10), 227 * 1024, "UTC[A-Z]*MMA"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), configs.Arch("cuda", 12), 99 * 1024, "[HQ]MMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), configs.Arch("hip", 9), 64 * 1024, "v_mfma"),
}
NAMES = {
    torch.bool: "i1",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


class Launch(NamedTuple):
    """A kernel as the runtime would specialise it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int | None

    @property
    def name(self) -> str:
        """What tells this launch from others of the kernel."""
        known = dict(self.constants)
        flags = [k.lower() for k in FLAGS if known.get(k)]
        flags += [f"{k.lower()}={known[k]}" for k in ("OUTPUTS", "SAVED") if known.get(k)]
        flags += ["odd rows"] if self.kernel in ROWS and "stride" not in self.aligned else []
        types = [t.split(",NVMMA")[0] for n, t in self.signature if n in ("hidden", "a", "exps", "out")]
        return ",".join([*dict.fromkeys(types), *flags])


def specialise(module: str, name: str, warps: int, stages: int | None, arguments: dict[str, Any]) -> Launch:
    kernel = getattr(kernels(module), name)
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        kind = "constexpr"
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            kind = f"*{NAMES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(parameter.name)
        elif isinstance(value, GluonDescriptor):
            kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            kind = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(parameter.name)
        else:
            kind = "fp32"
        signature.append((parameter.name, kind))
    return Launch(module, name, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def compile_for(target: Target, launch: Launch) -> Any:
    kernel = getattr(kernels(launch.module), launch.kernel)
    names = [p.name for p in kernel.params]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    options = {"num_warps": launch.warps} | ({} if launch.stages is None else {"num_stages": launch.stages})
    source = (GluonASTSource if launch.module in GLUON else ASTSource)(
        kernel, dict(launch.signature), dict(launch.constants), attributes
    )
    return triton.compile(source, target=target.gpu, options=options)


def disassembled(made: Any) -> tuple[str, str]:
    """Of a compiled kernel for NVIDIA: cuobjdump's account of registers and memory, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        flags = ("--dump-resource-usage", "--dump-sass")
        found = [
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in flags
        ]
    return found[0], found[1]


def stand_in(name: str, arguments: dict[str, Any], share: float) -> None:
    """What a filter's kernels leave for the host, where launches are left out: of so large a share of the columns that
    they stay."""
    if name == "mark_kernel" or (name == "forward_kernel" and arguments["MARK"]):
        arguments["flags"].copy_(torch.rand(arguments["flags"].shape) < share)
        arguments["drops"].fill_(0.1)
    if name == "known_kernel":
        arguments["dropped"].fill_(0.1)
    if name == "count_kernel":
        tiles = arguments["flags"].split(arguments["tile"], 1)
        arguments["counts"].copy_(torch.stack([tile.sum(1) for tile in tiles], 1))
