"""What is measured: one named row per case.

Levels: "logits" (log-probs from logits), "hidden" (log-probs from hidden states and the head's weight), "dpo" (the DPO
loss from hidden states, reference included) and "train" (a training step of a whole model). Modes: "score" (no
gradient), "full" (all gradients) and "frozen" (the weight needs none).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.configurations import TABLES

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One row. tokens counts every position; `masked` is the share of them that carry no label (prompts).

    inputs: "peaked" (a trained model's softmax, labels drawn from it) or "noise" (nearly flat, labels at random).
    sequences: the leading dimension; the first half is chosen, the second rejected.
    memory_budget: bytes, ours only; None is the default.
    curve: the picture that the row is a point of, "tokens", "vocabulary" or "budget"; None for the table.
    peers: the names that run; None for all of the level. without: names that do not.
    configurations: names of those of ours that run besides.
    memory_of: the names whose peak memory is measured; None for all.
    timed: False for a shape that is too large to verify and time here: its memory alone is measured, of one step.
    verified: so many tokens, spread over all of them, are compared with the exact answer; 0 for all.
    copied: bytes of a copy that is timed beside, which shows what the memory's bandwidth is.
    needs: seconds that must be left to start it, where time is limited.
    """

    name: str
    level: str
    mode: str
    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    masked: float = 0.0
    inputs: str = "peaked"
    sequences: int = 8
    memory_budget: int | None = None
    curve: str | None = None
    peers: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    configurations: tuple[str, ...] = ()
    memory_of: tuple[str, ...] | None = None
    timed: bool = True
    min_rounds: int = 5
    verified: int = 0
    copied: int = 0
    needs: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def length(self) -> int:
        return self.tokens // self.sequences

    @property
    def prompt(self) -> int:
        """Positions of a sequence that carry no label: its first."""
        return round(self.masked * self.length)

    @property
    def counted_tokens(self) -> int:
        return self.sequences * (self.length - self.prompt)

    @property
    def needed_gemms(self) -> int:
        """Products that nobody can do without: 1 forward, 1 for each gradient, 1 for DPO's reference."""
        return 1 + len(self.wanted) + (self.level == "dpo") if self.level in ("hidden", "dpo") else 0

    @property
    def gemm_flop(self) -> float:
        return 2.0 * self.counted_tokens * self.hidden_size * self.vocab_size

    @property
    def wanted(self) -> tuple[str, ...]:
        """The inputs that want a gradient."""
        of_full = ("logits",) if self.level == "logits" else ("hidden", "weight")
        return of_full[: {"score": 0, "frozen": 1, "full": 2}[self.mode]]

    @property
    def floors(self) -> tuple[str, ...]:
        """What is timed beside the peers; ratios are to the first."""
        if self.level == "train" or not self.timed:
            return ()
        return ("bare copy" if self.level == "logits" else "bare GEMMs", *(("a large copy",) if self.copied else ()))

    @property
    def shape(self) -> str:
        """(N, D, V), in words where they matter."""
        sizes = [self.tokens, *([] if self.level == "logits" else [self.hidden_size]), self.vocab_size]
        masked = f", {self.counted_tokens:,} count" if self.masked else ""
        return " x ".join(f"{size:,}" for size in sizes) + f", {self.dtype}{masked}"


# The field of a case that a curve is drawn over.
CURVES = {"tokens": "tokens", "vocabulary": "vocab_size", "budget": "memory_budget"}


def _curve(base: Case, curve: str, *values: int) -> list[Case]:
    """The points of a curve; a budget is in MiB."""
    unit = MIB if curve == "budget" else 1
    return [replace(base, name=f"{curve}-{x}", curve=curve, **{CURVES[curve]: x * unit}) for x in values]  # type: ignore


# Peers that a curve compares: the others say nothing new there.
_ON_CURVES = ("dpo_kernels", "plain PyTorch", "CCE torch_compile")
# Whose memory is measured where that of all would take too long.
_MAIN = ("dpo_kernels", "plain PyTorch", "CCE torch_compile", "TRL ChunkedLogProbFunction")
# Takes seconds a call on two cores: measured in the case hidden-full-f32 alone.
_SLOW = "torch F.linear_cross_entropy, chunked"

_LOGITS = Case("", "logits", "full", 512, 64, 32_000, "bfloat16", memory_of=())
_HIDDEN = Case("", "hidden", "full", 256, 512, 32_000, "bfloat16", without=(_SLOW,))
_POINT = Case("", "hidden", "full", 0, 256, 0, "bfloat16", peers=_ON_CURVES)
_DPO = Case("", "dpo", "full", 512, 512, 32_000, "bfloat16", without=(_SLOW,), memory_of=())
_LARGE = Case(
    "large-full-256MiB", "hidden", "full", 8192, 512, 151_936, "bfloat16", memory_budget=256 * MIB,
    peers=("dpo_kernels",), timed=False,
)  # fmt: skip
_UNDER_A_BUDGET = [_LARGE, replace(_LARGE, name="large-frozen-64MiB", mode="frozen", memory_budget=64 * MIB)]
# The model has two layers of the given size.
_TRAIN = Case("train-step", "train", "full", 512, 256, 32_000, "float32", masked=0.6, sequences=4)

SMALL = [
    replace(_LOGITS, name="logits-forward-f32", mode="score", dtype="float32"),
    replace(_LOGITS, name="logits-forward-bf16", mode="score"),
    replace(_LOGITS, name="logits-full-f32", dtype="float32"),
    replace(_LOGITS, name="logits-full-bf16", memory_of=None),
    replace(_HIDDEN, name="hidden-forward-bf16", mode="score"),
    replace(_HIDDEN, name="hidden-full-f32", dtype="float32", without=(), memory_of=_MAIN),
    replace(_HIDDEN, name="hidden-full-bf16"),
    replace(_HIDDEN, name="hidden-full-bf16-noise", inputs="noise", memory_of=()),
    replace(_HIDDEN, name="hidden-frozen-bf16", mode="frozen"),
    replace(_DPO, name="dpo-30%-masked", masked=0.3),
    replace(_DPO, name="dpo-60%-masked", masked=0.6, memory_of=None),
    replace(_DPO, name="dpo-90%-masked", masked=0.9),
    replace(_DPO, name="dpo-60%-masked-frozen", masked=0.6, mode="frozen", memory_of=_MAIN),
    *_UNDER_A_BUDGET,
    *_curve(replace(_POINT, vocab_size=32_000), "tokens", 64, 256, 512, 1024),
    *_curve(replace(_POINT, tokens=128), "vocabulary", 8_000, 32_000, 151_936),
    *_curve(Case("", "hidden", "full", 2048, 512, 8_000, "bfloat16", peers=("dpo_kernels",)), "budget", 28, 36, 48, 72),
    _TRAIN,
]  # fmt: skip

_REAL_LOGITS = Case("", "logits", "full", 8192, 64, 151_936, "bfloat16")
_REAL = replace(_REAL_LOGITS, level="hidden", hidden_size=4096)
_REAL_CURVE = replace(_REAL, hidden_size=2048, peers=_ON_CURVES)
REAL = [
    replace(_REAL_LOGITS, name="logits-forward-bf16", mode="score"),
    replace(_REAL_LOGITS, name="logits-full-f32", tokens=4096, dtype="float32"),
    replace(_REAL_LOGITS, name="logits-full-bf16"),
    replace(_REAL, name="hidden-forward-bf16", mode="score"),
    replace(_REAL, name="hidden-full-f32", tokens=4096, hidden_size=2048, vocab_size=128_256, dtype="float32"),
    replace(_REAL, name="hidden-full-bf16"),
    replace(_REAL, name="hidden-full-bf16-noise", inputs="noise"),
    replace(_REAL, name="hidden-full-bf16-128k", vocab_size=128_256),
    replace(_REAL, name="hidden-frozen-bf16", mode="frozen"),
    *(replace(_REAL, name=f"dpo-{share}%-masked", level="dpo", masked=share / 100) for share in (30, 60, 90)),
    replace(_REAL, name="dpo-60%-masked-frozen", level="dpo", mode="frozen", masked=0.6),
    *_curve(_REAL_CURVE, "tokens", *(2**n for n in range(10, 18))),
    *_curve(_REAL_CURVE, "vocabulary", 32_000, 64_000, 128_256, 151_936, 262_144),
    *_curve(
        replace(_REAL_CURVE, peers=("dpo_kernels",)), "budget", 256, 512, 1024, 1536, 2048, 2560, 3072, 4096
    ),
    replace(_TRAIN, tokens=8192, hidden_size=1024, vocab_size=151_936, sequences=8),
]  # fmt: skip

# What the C++ kernels are for: the shapes of docs/cpp.md, on a machine of a few cores.
_STEP = Case(
    "", "hidden", "full", 1024, 1024, 32_000, "bfloat16", without=(_SLOW, "TRL ChunkedLogProbFunction"), memory_of=()
)
_KINDS = (
    ("forward", "score", None), ("full", "full", None), ("full-64MiB", "full", 64 * MIB), ("frozen", "frozen", None),
)  # fmt: skip
CPU = [
    *(
        replace(_STEP, name=f"{name}-{short}", mode=mode, dtype=dtype, memory_budget=budget)
        for name, mode, budget in _KINDS
        for short, dtype in (("bf16", "bfloat16"), ("f32", "float32"))
    ),
    replace(_STEP, name="full-151936-bf16", tokens=512, vocab_size=151_936),
    *_UNDER_A_BUDGET,
    _TRAIN,
]

# On one GPU in minutes: every configuration of ours beside the peers. What compiles for a minute a shape, or says
# nothing new there, is left to the size "real".
_GPU = Case(
    "", "hidden", "full", 8192, 4096, 151_936, "bfloat16", verified=512, copied=2**30, needs=10.0,
    without=("dpo_kernels", "dpo_kernels torch", "torch.compile", "TRL selective_log_softmax", "CCE torch_compile"),
)  # fmt: skip
_GPU_LOGITS = replace(
    _GPU, level="logits", hidden_size=64, copied=0, without=("dpo_kernels", "dpo_kernels torch", "torch.compile")
)


def _with(base: Case, name: str, **tables: str) -> list[Case]:
    """A case a mode. tables: by mode, the configurations of ours."""
    return [
        replace(base, name=f"{name}-{mode}", mode=mode, configurations=tuple(TABLES[table]))
        for mode, table in tables.items()
    ]


_EVERY_STRATEGY = {"score": "strategies", "frozen": "strategies", "full": "modes"}
# Other tiles than those of the tables, among themselves.
_ALONE, _LOGITS_ALONE = (replace(base, peers=(), min_rounds=3) for base in (_GPU, _GPU_LOGITS))

# The most telling first: what time leaves out are the last ones.
GPU = [
    *_with(replace(_GPU, needs=20.0), "8k-152k", **_EVERY_STRATEGY),
    *_with(_GPU_LOGITS, "logits", score="triton", full="triton"),
    *_with(replace(_GPU, tokens=4096, vocab_size=128_256), "4k-128k", **_EVERY_STRATEGY),
    *_with(_ALONE, "products", score="products", full="products that keep"),
    *_with(_ALONE, "tiles", score="tiles"),
    *_with(_LOGITS_ALONE, "rows", score="rows", full="rows"),
    *_with(
        replace(_GPU, tokens=16_384, hidden_size=2048, vocab_size=248_320, needs=20.0), "16k-248k", **_EVERY_STRATEGY
    ),
    *_with(replace(_GPU, tokens=131_072, vocab_size=128_256, needs=30.0, min_rounds=2), "131k-128k", **_EVERY_STRATEGY),
]

# The same kinds of case for Triton's interpreter: they prove the code and time nothing.
_TINY = replace(
    _GPU, tokens=64, hidden_size=32, vocab_size=320, verified=16, copied=MIB, needs=0.0, min_rounds=1, memory_of=(),
    peers=("plain PyTorch", "quack linear cross entropy"), without=(),
)  # fmt: skip
_TINY_LOGITS = replace(_TINY, level="logits", copied=0, peers=("plain PyTorch",))
TINY = [
    *_with(_TINY, "tiny", **_EVERY_STRATEGY),
    *_with(_TINY_LOGITS, "logits", score="triton", full="triton"),
    *_with(replace(_TINY, peers=()), "products", score="tiny products", full="tiny products that keep"),
    *_with(replace(_TINY, peers=()), "tiles", score="tiny tiles"),
    *_with(replace(_TINY_LOGITS, peers=()), "rows", score="tiny rows", full="tiny rows"),
]

SIZES = {"small": SMALL, "cpu": CPU, "real": REAL, "gpu": GPU, "tiny": TINY}
SECONDS = {"small": 0.6, "cpu": 4.0, "real": 10.0, "gpu": 5.0, "tiny": 0.0}  # of timing a case, by size
