"""The tensors of a case: made like a trained model's, and changed between two verifications."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import Case

IGNORE = -100
# Float64 numbers that one block of rows may take while inputs and exact answers are made.
BLOCK_NUMBERS = 2**26

Outcome = dict[str, Tensor]  # "log_probs" (R, S) or "loss" (), and the gradients by the input's name
Step = Callable[[], Outcome]  # a peer's, run once to verify and then to time


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

    def per_token(self) -> dict[str, Tensor]:
        """Those whose leading dimensions are (R, S)."""
        return {name: t for name, t in self.tensors().items() if "weight" not in name}

    def change(self) -> None:
        """In place: half the gradient, and the pairs in another order, chosen and rejected each turned by one."""
        for t in self.per_token().values():
            halves = t.detach().chunk(2)
            t.detach().copy_(torch.cat([half.roll(1, 0) for half in halves]))
        self.cotangent.mul_(0.5)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if name in ("hidden", "weight", "logits")}

    def reference(self) -> Inputs:
        """The same call on the reference model."""
        assert self.ref_hidden is not None and self.ref_weight is not None  # noqa: PT018
        return replace(self, hidden=self.ref_hidden, weight=self.ref_weight)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Inputs of a case. Peaked ones: each hidden state points at one row of the weight, by 8 to 30, over noise of 2.5.

    That makes the median probability of a label about 0.9 and the mean entropy about 2 nats, with logits up to 40. The
    reference has a hidden state and a weight of its own, apart from the policy's by so much that beta (0.1) times the
    difference of log-ratios within a pair is about 1 to 2 either way, whatever the number of tokens.
    """
    generator = torch.Generator(device).manual_seed(0)

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
    labels[:, : case.prompt] = IGNORE
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
    """In TF32 on a GPU: more digits of a logit change nothing here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if hidden.is_cuda else before)
    flat = hidden.flatten(0, 1)
    labels = torch.empty(len(flat), dtype=torch.int64, device=hidden.device)
    for block in row_blocks(len(flat), len(weight)):
        p = torch.softmax(flat[block] @ weight.T, dim=1)
        labels[block] = torch.multinomial(p, 1, generator=generator).squeeze(1)
    torch.set_float32_matmul_precision(before)
    return labels.view(hidden.shape[:2])


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows of which each block of rows x columns stays within BLOCK_NUMBERS."""
    step = max(1, BLOCK_NUMBERS // columns)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))
