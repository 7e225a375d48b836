"""What is measured: one named row per case, and the inputs that each row runs on.

Levels: "logits" (log-probs from logits), "hidden" (log-probs from hidden states and the head's weight), "dpo" (the DPO
loss from hidden states, reference included) and "train" (a training step of a whole model). Modes: "score" (no
gradient), "full" (all gradients) and "frozen" (the weight needs none).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MIB = 2**20
IGNORE = -100
# Float64 numbers that one block of rows may take while inputs and exact answers are made.
BLOCK_NUMBERS = 2**26


@dataclass(frozen=True)
class Case:
    """One row. tokens counts every position; `masked` is the share of them that carry no label (prompts).

    inputs: "peaked" (a trained model's softmax, labels drawn from it) or "noise" (nearly flat, labels at random).
    sequences: the leading dimension; the first half is chosen, the second rejected.
    memory_budget: bytes, ours only; None is the default.
    curve: the picture that the row is a point of, "tokens", "vocabulary" or "budget"; None for the table.
    peers: the names that run; empty for all of the level. without: names that do not.
    weighed: the names whose peak memory is measured; None for all.
    timed: False for a shape that is too large to verify and time here: its memory alone is measured, of one step.
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
    peers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    weighed: tuple[str, ...] | None = None
    timed: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def length(self) -> int:
        return self.tokens // self.sequences

    @property
    def counted_tokens(self) -> int:
        """Positions that carry a label."""
        return self.sequences * (self.length - round(self.masked * self.length))

    @property
    def needed_gemms(self) -> int:
        """Products that nobody can do without: 1 forward, 1 for each gradient, 1 for DPO's reference."""
        return 0 if self.level == "logits" else 1 + len(self.wanted) + (self.level == "dpo")

    @property
    def gemm_flop(self) -> float:
        """Of one such product, for the tokens that count."""
        return 2.0 * self.counted_tokens * self.hidden_size * self.vocab_size

    @property
    def wanted(self) -> tuple[str, ...]:
        """The inputs that want a gradient."""
        if self.mode == "score":
            return ()
        if self.level == "logits":
            return ("logits",)
        return ("hidden",) if self.mode == "frozen" else ("hidden", "weight")


@dataclass
class Inputs:
    """The tensors of a case. logits are made at the logits level alone, where they stand for hidden and weight.

    hidden (R, S, D), weight (V, D), logits (R, S, V), labels (R, S) with -100 where masked.
    cotangent (R, S) float32: the gradient that comes into the log-probs, as DPO's does: one number a sequence, positive
    for rejected ones, 0 where masked. ref_hidden (R, S, D), ref_weight (V, D): the reference model's, for DPO alone.
    """

    labels: Tensor
    cotangent: Tensor
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    logits: Tensor | None = None
    memory_budget: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def copy(self, memory_budget: int | None) -> Inputs:
        copies = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in self.tensors().items()}
        return Inputs(**copies, memory_budget=memory_budget)

    def change(self) -> None:
        """In place: the pairs in another order, and half the gradient. `judge.Judge.changed` knows the new answer."""
        per_token = (self.labels, self.cotangent, self.hidden, self.ref_hidden, self.logits)
        for t in (t.detach() for t in per_token if t is not None):
            t.copy_(other_order(t))
        self.cotangent.mul_(0.5)

    def leaves(self) -> dict[str, Tensor]:
        """What may want a gradient."""
        return {name: t for name, t in self.tensors().items() if name in ("hidden", "weight", "logits")}

    def reference(self) -> Inputs:
        """The same call on the reference model."""
        assert self.ref_hidden is not None
        assert self.ref_weight is not None
        return replace(self, hidden=self.ref_hidden, weight=self.ref_weight)


def other_order(t: Tensor) -> Tensor:  # (R, ...)
    """Chosen and rejected sequences each turned by one, so that pairs stay pairs."""
    return torch.cat([half.roll(1, 0) for half in t.chunk(2)])


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Inputs of a case. Peaked ones: each hidden state points at one row of the weight, by 8 to 30, over noise of 2.5.

    That makes the median probability of a label about 0.9 and the mean entropy about 2 nats, with logits up to 40. The
    reference has a hidden state and a weight of its own, apart from the policy's by so much that beta (0.1) times the
    difference of log-ratios within a pair is about 1 to 2 either way, whatever the number of tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, length, d, v = case.sequences, case.length, case.hidden_size, case.vocab_size
    weight = normal(v, d) / d**0.5
    if case.inputs == "peaked":
        sharpness = 8 + 22 * torch.rand(rows, length, 1, generator=generator, device=device)
        at = torch.randint(v, (rows, length), generator=generator, device=device)
        hidden = sharpness * weight[at] + 2.5 * normal(rows, length, d)
        labels = _draw_labels(hidden, weight, generator)
    else:
        hidden = normal(rows, length, d)
        labels = torch.randint(v, (rows, length), generator=generator, device=device)
    labels[:, : round(case.masked * length)] = IGNORE
    strength = 0.5 + torch.rand(rows, 1, generator=generator, device=device)
    strength[: rows // 2] *= -1
    dtype = case.torch_dtype
    inputs = Inputs(
        labels, torch.where(labels == IGNORE, 0, strength), hidden.to(dtype), weight.to(dtype),
        memory_budget=case.memory_budget,
    )  # fmt: skip
    if case.level == "dpo":
        apart = 2.3 * (case.counted_tokens / rows) ** (-1 / 3)
        inputs.ref_hidden = (hidden + apart * normal(rows, length, d)).to(dtype)
        inputs.ref_weight = (weight + apart * normal(v, d) / d**0.5).to(dtype)
    if case.level == "logits":
        inputs.logits = hidden.to(dtype) @ weight.to(dtype).T
    for name in case.wanted:
        inputs.leaves()[name].requires_grad_()
    return inputs


def _draw_labels(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    flat = hidden.flatten(0, 1)
    labels = torch.empty(len(flat), dtype=torch.int64, device=hidden.device)
    for block in row_blocks(len(flat), len(weight)):
        p = torch.softmax(flat[block] @ weight.T, dim=1)
        labels[block] = torch.multinomial(p, 1, generator=generator).squeeze(1)
    return labels.view(hidden.shape[:2])


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows of which each block of rows x columns stays within BLOCK_NUMBERS."""
    step = max(1, BLOCK_NUMBERS // columns)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def _curve(base: Case, axis: str, field: str, values: tuple[int, ...]) -> list[Case]:
    """The points of a curve; a budget is named in MiB."""
    labels = [value // MIB if field == "memory_budget" else value for value in values]
    return [
        replace(base, **{"name": f"{axis}-{label}", "curve": axis, field: value})  # type: ignore[arg-type]
        for label, value in zip(labels, values, strict=True)
    ]


# Peers that a curve compares: the others say nothing new there.
_ON_CURVES = ("dpo_kernels", "plain PyTorch", "CCE torch_compile")
# Whose memory is measured where that of all would take too long.
_MAIN = ("dpo_kernels", "plain PyTorch", "CCE torch_compile", "TRL ChunkedLogProbFunction")
# Takes seconds a call on two cores: measured in the case hidden-full-f32 alone.
_SLOW = "torch F.linear_cross_entropy, chunked"

_LOGITS = Case("", "logits", "full", 512, 64, 32_000, "bfloat16", weighed=())
_HIDDEN = Case("", "hidden", "full", 256, 512, 32_000, "bfloat16", without=(_SLOW,))
_DPO = Case("", "dpo", "full", 512, 512, 32_000, "bfloat16", without=(_SLOW,), weighed=())
_LARGE = Case(
    "large-full-256MiB",
    "hidden",
    "full",
    8192,
    512,
    151_936,
    "bfloat16",
    memory_budget=256 * MIB,
    peers=("dpo_kernels",),
    timed=False,
)
_UNDER_A_BUDGET = [_LARGE, replace(_LARGE, name="large-frozen-64MiB", mode="frozen", memory_budget=64 * MIB)]
_TRAIN = Case("train-step", "train", "full", 512, 256, 32_000, "float32", masked=0.6, sequences=4)

SMALL = [
    replace(_LOGITS, name="logits-forward-f32", mode="score", dtype="float32"),
    replace(_LOGITS, name="logits-forward-bf16", mode="score"),
    replace(_LOGITS, name="logits-full-f32", dtype="float32"),
    replace(_LOGITS, name="logits-full-bf16", weighed=None),
    replace(_HIDDEN, name="hidden-forward-bf16", mode="score"),
    replace(_HIDDEN, name="hidden-full-f32", dtype="float32", without=(), weighed=_MAIN),
    replace(_HIDDEN, name="hidden-full-bf16"),
    replace(_HIDDEN, name="hidden-full-bf16-noise", inputs="noise", weighed=()),
    replace(_HIDDEN, name="hidden-frozen-bf16", mode="frozen"),
    replace(_DPO, name="dpo-30%-masked", masked=0.3),
    replace(_DPO, name="dpo-60%-masked", masked=0.6, weighed=None),
    replace(_DPO, name="dpo-90%-masked", masked=0.9),
    replace(_DPO, name="dpo-60%-masked-frozen", masked=0.6, mode="frozen", weighed=_MAIN),
    *_UNDER_A_BUDGET,
    *_curve(
        Case("", "hidden", "full", 0, 256, 32_000, "bfloat16", peers=_ON_CURVES), "tokens", "tokens",
        (64, 256, 512, 1024),
    ),
    *_curve(
        Case("", "hidden", "full", 128, 256, 0, "bfloat16", peers=_ON_CURVES), "vocabulary", "vocab_size",
        (8_000, 32_000, 151_936),
    ),
    *_curve(
        Case("", "hidden", "full", 2048, 512, 8_000, "bfloat16", peers=("dpo_kernels",)), "budget", "memory_budget",
        tuple(size * MIB for size in (28, 36, 48, 72)),
    ),
]  # fmt: skip

REAL = [
    Case("logits-forward-bf16", "logits", "score", 8192, 64, 151_936, "bfloat16"),
    Case("logits-full-f32", "logits", "full", 4096, 64, 151_936, "float32"),
    Case("logits-full-bf16", "logits", "full", 8192, 64, 151_936, "bfloat16"),
    Case("hidden-forward-bf16", "hidden", "score", 8192, 4096, 151_936, "bfloat16"),
    Case("hidden-full-f32", "hidden", "full", 4096, 2048, 128_256, "float32"),
    Case("hidden-full-bf16", "hidden", "full", 8192, 4096, 151_936, "bfloat16"),
    Case("hidden-full-bf16-noise", "hidden", "full", 8192, 4096, 151_936, "bfloat16", inputs="noise"),
    Case("hidden-full-bf16-128k", "hidden", "full", 8192, 4096, 128_256, "bfloat16"),
    Case("hidden-frozen-bf16", "hidden", "frozen", 8192, 4096, 151_936, "bfloat16"),
    Case("dpo-30%-masked", "dpo", "full", 8192, 4096, 151_936, "bfloat16", masked=0.3),
    Case("dpo-60%-masked", "dpo", "full", 8192, 4096, 151_936, "bfloat16", masked=0.6),
    Case("dpo-90%-masked", "dpo", "full", 8192, 4096, 151_936, "bfloat16", masked=0.9),
    Case("dpo-60%-masked-frozen", "dpo", "frozen", 8192, 4096, 151_936, "bfloat16", masked=0.6),
    *_curve(
        Case("", "hidden", "full", 0, 2048, 151_936, "bfloat16", peers=_ON_CURVES), "tokens", "tokens",
        (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072),
    ),
    *_curve(
        Case("", "hidden", "full", 8192, 2048, 0, "bfloat16", peers=_ON_CURVES), "vocabulary", "vocab_size",
        (32_000, 64_000, 128_256, 151_936, 262_144),
    ),
    *_curve(
        Case("", "hidden", "full", 8192, 2048, 151_936, "bfloat16", peers=("dpo_kernels",)), "budget", "memory_budget",
        tuple(size * MIB for size in (256, 512, 1024, 1536, 2048, 2560, 3072, 4096)),
    ),
]  # fmt: skip

# What the C++ kernels are for: the shapes of docs/cpp.md, on a machine of a few cores.
_STEP = Case(
    "", "hidden", "full", 1024, 1024, 32_000, "bfloat16", without=(_SLOW, "TRL ChunkedLogProbFunction"), weighed=()
)
_TYPES = (("bf16", "bfloat16"), ("f32", "float32"))
CPU = [
    *(replace(_STEP, name=f"forward-{short}", mode="score", dtype=dtype) for short, dtype in _TYPES),
    *(replace(_STEP, name=f"full-{short}", dtype=dtype) for short, dtype in _TYPES),
    *(replace(_STEP, name=f"full-64MiB-{short}", dtype=dtype, memory_budget=64 * MIB) for short, dtype in _TYPES),
    *(replace(_STEP, name=f"frozen-{short}", mode="frozen", dtype=dtype) for short, dtype in _TYPES),
    replace(_STEP, name="full-151936-bf16", tokens=512, vocab_size=151_936),
    *_UNDER_A_BUDGET,
]

SIZES = {"small": SMALL, "cpu": CPU, "real": REAL}

# Tokens are those of all sequences, prompts included; the model has two layers of the given size.
TRAINING = {
    "small": _TRAIN,
    "cpu": _TRAIN,
    "real": Case("train-step", "train", "full", 8192, 1024, 151_936, "float32", masked=0.6, sequences=8),
}
