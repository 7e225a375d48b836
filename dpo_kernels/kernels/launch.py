"""How kernels are launched, on which devices, and how calls become their arguments."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import overrides
from dpo_kernels.call import TokenGrads, Transform
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

OLDEST_TRITON = (3, 5)
OLDEST_CAPABILITY = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run there; None if they can."""
    if device.type == "cpu":
        if not _asked_to_interpret():
            return "it runs on GPUs; on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    elif device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    elif not torch.cuda.is_available():
        return "torch finds no GPU (torch.cuda.is_available() is False)"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"compute capability {torch.cuda.get_device_capability(device)} is older than {OLDEST_CAPABILITY}"
    return _no_triton() or (_no_wide_products(device) if device.type == "cuda" else None)


@functools.cache
def arch_of(device: torch.device) -> Arch:
    if device.type == "cpu":
        return Arch("interpreted", 0)
    major, _ = torch.cuda.get_device_capability(device)
    return Arch("cuda" if torch.version.hip is None else "hip", major)


def _asked_to_interpret() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); torch's own wheels for CUDA and ROCm bring it: pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton is {triton.__version__}, and {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
    return None


@functools.cache
def _no_wide_products(device: torch.device) -> str | None:
    """Older builds for ROCm cannot write a product of bfloat16 in float32."""
    try:
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        wide = torch.zeros(16, 16, dtype=torch.float32, device=device)
        torch.addmm(wide, ones, ones, out_dtype=torch.float32, out=wide)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "captur" in str(error):
            raise  # says nothing of the build
        return f"this build of torch cannot multiply bfloat16 into float32 ({error}); a later torch can"
    return None


def run(module: str, name: str, programs: int, warps: int, stages: int | None = None, /, **arguments: Any) -> None:
    launch = overrides.current().launch or run_kernel
    launch(module, name, programs, warps, stages, arguments)


def run_kernel(
    module: str, name: str, programs: int, warps: int, stages: int | None, arguments: dict[str, Any]
) -> None:
    """Runs a kernel of `dpo_kernels.kernels`."""
    options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
    getattr(kernels(module), name)[(programs,)](**arguments, **options)


def kernels(module: str) -> ModuleType:
    return importlib.import_module(f"dpo_kernels.kernels.{module}")


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can name the matrix: contiguous rows that start aligned, none within another."""
    step, last = matrix.stride()
    return last == 1 and step >= matrix.shape[1] and step % 16 == 0 and matrix.data_ptr() % 16 == 0


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


def shared_descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """The like, of blocks that a Gluon kernel lays out in shared memory as tensor cores read them."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns], layout)


@functools.cache
def has_gluon() -> bool:
    """As kernels/hopper.py takes it: of triton 3.6 and later."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@functools.cache
def multiprocessors(device: torch.device) -> int | None:
    """Of the device that is there; None of another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def vectors(grads: TokenGrads, entropies: bool = True) -> dict[str, Tensor]:
    """One number a token each; kernels read them without a stride. entropies: with them and their gradients."""
    grad = grads.grad_log_probs.contiguous()
    entropy, grad_entropy = grads.entropy, grads.grad_entropy
    found = {
        "labels": grads.labels.contiguous(), "log_probs": grads.log_probs.contiguous(),
        "maxima": grads.maximum.contiguous(), "log_sums": grads.log_sum.contiguous(), "grads": grad,
    }  # fmt: skip
    if entropies:
        found["entropies"] = grad if entropy is None else entropy.contiguous()
        found["grad_entropies"] = grad if grad_entropy is None else grad_entropy.contiguous()
    return found


def gradient_bits(grads: TokenGrads) -> int:
    return bits(()) if grads.grad_entropy is None else bits(("entropy",))


def bits(outputs: tuple[str, ...]) -> int:
    """OUTPUTS of kernels/softmax_state.py."""
    return sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in outputs)


def scales_last(arguments: dict[str, Any]) -> bool:
    """Whether kernels that multiply by `outer` what is left of the largest logit hold its numbers: 0 times a scale that
    is infinite, or -inf times one that is 0, would be NaN."""
    return not arguments["CAPPED"] and 1e-30 < arguments["outer"] < 1e30


def transform_arguments(transform: Transform) -> dict[str, Any]:
    if transform.softcap is None:
        return {"inner": 1.0, "outer": transform.slope, "CAPPED": False}
    return {
        "inner": transform.logit_scale / transform.softcap, "outer": transform.softcap / transform.temperature,
        "CAPPED": True,
    }  # fmt: skip
