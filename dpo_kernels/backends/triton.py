"""The back end for GPUs, NVIDIA's and AMD's: the Triton kernels of `dpo_kernels.kernels`.

Two strategies (`kernels.configs`): in "fused" the kernel that makes a block of logits accumulates it; in "tiles" cuBLAS
makes a tile of logits in float32 and a kernel accumulates it. On a CPU the same kernels run in Triton's interpreter, to
be tested: TRITON_INTERPRET=1 must be set before the first import of triton.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels import overrides
from dpo_kernels.backends.base import MIB, Execution
from dpo_kernels.backends.triton_fused import FusedTileOps
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.backends.triton_tiles import CublasTileOps, TritonTileOps, accumulate_rows, gradient
from dpo_kernels.call import Call, TokenGrads, Tokens, Transform
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.kernels import configs, launch
from dpo_kernels.kernels.configs import KernelConfig
from dpo_kernels.layout import in_matrix, lies_in_rows
from dpo_kernels.planner import Plan

WHOLE = 2**31  # columns: a tile of products is never split

# Sums of gradients are read and written once a tile: at 4096 features tiles of 4096 x 4096 spend more on them than a
# tile of 8192 x 8192 spends on going through memory (benchmarks/predict.py; waits for a measurement).
_TILES = (
    (8192, 8192), (8192, 4096), (4096, 4096), (2048, 2048), (1024, 1024), (512, 512), (256, 256), (128, 256),
)  # fmt: skip
# A call of few tokens is bound by the host, which launches as much for a narrow tile as for a wide one. 32 MiB of half
# precision stay in the cache of an H100 (waits for a measurement).
_WIDE_TILES = ((256, 65536), (512, 32768), (1024, 16384))
# What the library of products holds, by PyTorch's choice: a workspace a handle, and a handle a thread, of which
# autograd has one of its own for backward. LOADED: what else a first call loads, a guess that no GPU has measured.
HANDLES, LOADED = 2, 16 * MIB
WORKSPACES = {("cuda", 8): 65 * MIB // 8, ("cuda", 9): 32 * MIB, ("hip", 9): 128 * MIB}
_ON_GPUS = Capabilities(
    _TILES,
    LOADED,
    one_pass=True,
    no_temporaries=True,
    rounds=True,
    maxima_columns=64,
    saved_multiple=128,
    wide_tiles=_WIDE_TILES,
)
CAPABILITIES = {
    "cuda": _ON_GPUS,
    "hip": _ON_GPUS,
    "interpreted": Capabilities(
        ((256, 512), (128, 256), (64, 128), (64, 64)), 12 * MIB, widens=(torch.bfloat16, torch.float16),
        one_pass=True, no_temporaries=True, maxima_columns=32, saved_multiple=64,
    ),
}  # fmt: skip


class TritonBackend:
    """See `dpo_kernels.backends.base.Backend` for what each method does."""

    name = "triton"
    largest_vocabulary = 2**24  # argmax is held in float32
    devices: tuple[str, ...] = ("cuda",)  # ROCm's devices have this name too

    def unavailable(self, device: torch.device) -> str | None:
        return None if overrides.current().arch is not None else launch.unavailable(device)

    cannot_run = unavailable  # nothing is built ahead, so there is nothing more to know

    def declines_head(self, hidden: Tensor, weight: Tensor) -> bool:
        return False

    def declines_logits(self, logits: Tensor) -> bool:
        return not lies_in_rows(logits)

    def configure(self, device: torch.device, features: int, compute_dtype: torch.dtype, extras: bool) -> KernelConfig:
        changes = overrides.current()
        arch = changes.arch or launch.arch_of(device)
        operand = torch.float32 if compute_dtype in CAPABILITIES[arch.kind].widens else compute_dtype
        return configs.resolve(arch, features, operand, extras, changes.kernels)

    def capabilities(self, device: torch.device, configuration: KernelConfig) -> Capabilities:
        """cuBLAS may sum a row in another order in a tile of another height: there saved tokens are whole tiles.

        A block of columns has a maximum of its own: it shares a slot with no other.
        """
        arch = configuration.arch
        known = CAPABILITIES[arch.kind]
        workspaces = [room for (kind, major), room in WORKSPACES.items() if kind == arch.kind and major <= arch.major]
        if workspaces:
            known = replace(known, scratch=HANDLES * workspaces[-1] + known.scratch)
        if configuration.strategy == "tiles":
            whole = replace(configuration.splits(configuration.rows), columns=WHOLE)
            # A tile of float32 products is written and read: it stays as small as it is.
            return replace(known, one_pass=False, saved_multiple=None, splits=(whole,), wide_tiles=())
        assert known.maxima_columns is not None
        return replace(
            known, maxima_columns=min(known.maxima_columns, configuration.product.block_n),
            splits=tuple(map(configuration.splits, dict.fromkeys(configuration.either))), filters="gather",
            group=configuration.product.block_m, one_base=arch.kind != "hip",  # whose compiler spills registers for it
        )  # fmt: skip

    def tile_ops(self, call: Call, plan: Plan, execution: Execution) -> TritonTileOps:
        fused = execution.configuration.strategy == "fused"
        block = execution.configuration.product.block_n if fused else plan.maxima_columns
        if block % plan.maxima_columns or (plan.vocab_tiles > 1 and plan.tile_vocab % block):
            raise ValueError(
                f"tiles of {plan.tile_vocab} vocabulary entries in blocks of {block}, whose maxima are held for every "
                f"{plan.maxima_columns}; expected multiples of each other"
            )
        return (FusedTileOps if fused else CublasTileOps)(call, plan, execution)

    def logits_forward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, configuration: KernelConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix, index = in_matrix(logits, tokens.index)
        vocab_size = matrix.shape[1]
        state = TritonState(tokens.labels, vocab_size, ())
        if tokens.count:
            block = configuration.rows
            split = configuration.splits(block).width(tokens.count, vocab_size, vocab_size)
            rows = slice(0, tokens.count)
            accumulate_rows(state, rows, matrix, index, tokens.labels, None, transform, 0, split, configuration)
        done = state.finish()
        return done.stats.log_probs, done.maximum, done.log_sum, done.label_logit

    def logits_backward(
        self,
        logits: Tensor,
        tokens: Tokens,
        transform: Transform,
        grads: TokenGrads,
        out: Tensor,
        configuration: KernelConfig,
    ) -> None:
        matrix, index = in_matrix(logits, tokens.index)
        to, out_index = (matrix, index) if out is logits else in_matrix(out, tokens.index)
        gradient(matrix, index, to, out_index, None, grads, transform, 0, configuration)

    def out_of_reach(self, maximum: Tensor) -> bool:
        return False

    def empty_cache(self) -> int:
        return 0
