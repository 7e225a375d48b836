"""Verify, then time: every peer of a case on the same inputs, in interleaved rounds. A wrong result is never timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import IGNORE, Case, Inputs, make_inputs, row_blocks
from benchmarks.peak_memory import peak_bytes
from benchmarks.peers import BETA, PEERS, Adapter, Peer, first_line, floor_name, make_floor, peers_of
from dpo_kernels import Plan, plan, reference

# A result is right if its error is at most FACTOR x that of plain PyTorch in the same dtype + ULPS x the dtype's eps,
# the latter times the largest exact value for log-probs and times 1 for the loss and for relative gradient errors.
# The loss is a difference of float32 sums of some hundred log-probs: LOSS_FLOOR is what those round by.
FACTOR, ULPS, LOSS_FLOOR = 4.0, 2.0, 1e-5
MIN_ROUNDS, MAX_ROUNDS = 3, 15

Outcome = dict[str, Tensor]  # "log_probs" (R, S) or "loss" (), and the gradients by the input's name


@dataclass
class Row:
    """What is known of one peer in one case.

    status: "timed", "floor", "wrong" or "unavailable" (the last two with a reason, and no time).
    seconds: median over `rounds` interleaved rounds, `quartiles` their first and third quartile; `samples` all of them.
    to_floor, to_ours: medians of the ratios within the same round, this peer's time over the other's.
    bytes: held at the peak beyond the inputs, gradients included; a reason where that could not be measured.
    returned_bytes: outputs and gradients. predicted_bytes: what dpo_kernels plans to hold beyond inputs and those;
    library_bytes: the part of it that is an allowance for the GEMM library.
    errors, allowed: against float64; log_probs and loss absolute (the largest), gradients relative (Frobenius norm).
    """

    case: dict[str, Any]
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
    bytes_reason: str = ""
    returned_bytes: int | None = None
    predicted_bytes: int | None = None
    library_bytes: int | None = None
    mode: str = ""
    gemms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)


def step(run: Adapter, case: Case, inputs: Inputs) -> Outcome:
    """One forward, and a backward where the case wants gradients."""
    leaves = inputs.leaves()
    clear(leaves.values())
    with torch.set_grad_enabled(bool(case.wanted)):
        out = run(inputs)
    if case.wanted:
        out.backward(None if case.level == "dpo" else inputs.cotangent.to(out.dtype))
    grads = {name: leaves[name].grad for name in case.wanted}
    return {"loss" if case.level == "dpo" else "log_probs": out.detach()} | {
        k: g for k, g in grads.items() if g is not None
    }


def clear(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def by_rows(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outcome:
    """The answer of plain PyTorch in a dtype, in blocks of rows that fit into memory; in float64 the exact one."""

    def leaf(t: Tensor, name: str) -> Tensor:
        return t.detach().to(dtype).requires_grad_(name in case.wanted)

    labels, counts = inputs.labels.flatten(), inputs.labels != IGNORE
    if inputs.logits is not None:
        source, head = leaf(inputs.logits.flatten(0, 1), "logits"), None
    else:
        source, head = leaf(inputs.hidden.flatten(0, 1), "hidden"), leaf(inputs.weight, "weight")

    def log_probs(rows: slice, source: Tensor, head: Tensor | None) -> Tensor:
        if head is None:
            return reference.logits_to_log_probs(source[rows], labels[rows])
        return reference.hidden_to_log_probs(source[rows], head, labels[rows])

    blocks = list(row_blocks(len(labels), case.vocab_size))

    @torch.no_grad()
    def all_rows(source: Tensor, head: Tensor | None) -> Tensor:
        return torch.cat([log_probs(rows, source, head) for rows in blocks]).view(counts.shape)

    values = all_rows(source, head)
    outcome, cotangent = {"log_probs": values}, inputs.cotangent
    if case.level == "dpo":
        of_reference = all_rows(leaf(inputs.ref_hidden.flatten(0, 1), ""), leaf(inputs.ref_weight, ""))
        values.requires_grad_()
        loss = reference.dpo_loss(of_reference, values, counts, BETA)[0]
        (cotangent,) = torch.autograd.grad(loss, values)
        outcome = {"loss": loss.detach()}
    if case.wanted:
        for rows in blocks:
            part = log_probs(rows, source, head)
            part.backward(cotangent.flatten()[rows].to(part.dtype))
        names = ("logits",) if head is None else ("hidden", "weight")
        grads = {name: t.grad for name, t in zip(names, (source, head), strict=False) if t is not None}
        outcome |= {name: g.view(inputs.leaves()[name].shape) for name, g in grads.items() if g is not None}
    return outcome


def errors_of(outcome: Outcome, exact: Outcome, counts: Tensor) -> dict[str, float]:
    """Against float64: absolute (the largest) for log_probs where they count and loss, relative for gradients.

    Infinite where an answer is missing, of the wrong shape, or NaN.
    """
    errors = {}
    for name, truth in exact.items():
        got = outcome.get(name)
        if got is None or got.shape != truth.shape:
            errors[name] = float("inf")
            continue
        difference = got.double() - truth
        if name == "log_probs":
            difference = difference[counts]
        error = difference.abs().max() if name in ("log_probs", "loss") else difference.norm() / truth.norm()
        errors[name] = error.item() if error.isfinite() else float("inf")
    return errors


@lru_cache(maxsize=1)  # the points of the budget curve share one
def judge_of(case: Case, device: torch.device) -> Judge:
    return Judge.of(case, make_inputs(case, device))


@dataclass(frozen=True)
class Judge:
    """Knows the exact answer of a case, and how far plain PyTorch in the same dtype is from it."""

    exact: Outcome
    allowed: dict[str, float]
    counts: Tensor

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Judge:
        counts = inputs.labels != IGNORE
        exact = by_rows(case, inputs, torch.float64)
        return cls.beside(exact, by_rows(case, inputs, case.torch_dtype), case.torch_dtype, counts)

    @classmethod
    def beside(cls, exact: Outcome, plain: Outcome, dtype: torch.dtype, counts: Tensor) -> Judge:
        """From the exact outcome and plain PyTorch's in the dtype."""
        ulps = ULPS * torch.finfo(dtype).eps
        floor = dict.fromkeys(exact, ulps)
        if "log_probs" in exact:
            floor["log_probs"] *= exact["log_probs"][counts].abs().max().item()
        if "loss" in exact:
            floor["loss"] = max(ulps, LOSS_FLOOR)
        errors = errors_of(plain, exact, counts)
        return cls(exact, {name: FACTOR * error + floor[name] for name, error in errors.items()}, counts)

    def verdict(self, outcome: Outcome) -> tuple[dict[str, float], str]:
        """The errors, and "" or what is wrong."""
        errors = errors_of(outcome, self.exact, self.counts)
        wrong = [
            f"error of {name} {error:.1e}, allowed {self.allowed[name]:.1e}"
            for name, error in errors.items()
            if not error <= self.allowed[name]
        ]
        return errors, "; ".join(wrong)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(runs: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> list[dict[str, float]]:
    """Times every function once a round, each round starting with another one; a dict of seconds a round.

    Whoever has used up an equal share of `seconds` sits out: after MIN_ROUNDS, or before if it took 3 x all of them.
    """
    names = list(runs)
    spent = dict.fromkeys(names, 0.0)
    rounds: list[dict[str, float]] = []
    for r in range(MAX_ROUNDS):
        limit = 3 * seconds if r < MIN_ROUNDS else seconds / len(names)
        part = [name for name in names if spent[name] < limit]
        if not part:
            break
        first = r % len(part)
        times = {}
        for name in part[first:] + part[:first]:
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            times[name] = time.perf_counter() - start
            spent[name] += times[name]
        rounds.append(times)
    return rounds


def ratio(rounds: Sequence[dict[str, float]], name: str, other: str) -> float | None:
    """The median of name / other over the rounds in which both took part."""
    both = [times[name] / times[other] for times in rounds if name in times and other in times]
    return statistics.median(both) if both else None


def is_ours(peer: str) -> bool:
    return peer.startswith("dpo_kernels")


def predicted(case: Case, device: torch.device) -> Plan | None:
    """What dpo_kernels plans for the case, where it is one call."""
    if case.level != "hidden":
        return None
    return plan(
        case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
        memory_budget=case.memory_budget, device=device.type,
    )  # fmt: skip


def measure(
    case: Case,
    *,
    peers: Sequence[Peer] | None = None,
    device: torch.device | str = "cpu",
    seconds: float = 5.0,
) -> list[Row]:
    """All rows of a case: the floor, then each peer, verified against float64 and, where right, timed and weighed.

    Args:
        peers: those of the case, unless given.
        seconds: about how long the timing takes together, beyond its first MIN_ROUNDS rounds.
    """
    device = torch.device(device)
    inputs = make_inputs(case, device)
    judge = judge_of(replace(case, name="", memory_budget=None), device)
    floor = Row(asdict(case), floor_name(case), "floor")
    runs: dict[str, Callable[[], object]] = {floor.peer: make_floor(case, inputs)}
    runs[floor.peer]()  # the first call of a product loads and tunes
    rows = [floor]
    for peer in peers_of(case) if peers is None else peers:
        row = Row(asdict(case), peer.name, "unavailable", marks=peer.notes(case), reason=peer.unavailable(device) or "")
        if peer.impl is not None and (planned := predicted(case, device)) is not None:
            row.predicted_bytes, row.library_bytes = planned.bytes, planned.memory["GEMM library"]
            row.mode, row.gemms = planned.mode, planned.gemms
        run = partial(step, peer.adapters[case.level], case, inputs)
        if verify(row, run, judge):
            runs[peer.name] = run
        rows.append(row)
    fill_times(rows, runs, seconds, device)
    if case.memory:
        fill_bytes(rows, seconds, device, lambda row: peak_bytes(device, prepare, case, row.peer))
    return rows


def prepare(device: torch.device, case: Case, peer: str) -> tuple[Callable[[], Outcome], Callable[[], None]]:
    """A peer's step of a case, and what frees the gradients that it left: for `peak_bytes`."""
    inputs = make_inputs(replace(case, inputs="noise"), device)  # quicker to make, and the bytes are the same
    run = next(p for p in PEERS if p.name == peer).adapters[case.level]
    return partial(step, run, case, inputs), lambda: clear(inputs.leaves().values())


def verify(row: Row, run: Callable[[], Outcome], judge: Judge) -> bool:
    """Runs a step once, unless the row has a reason not to, and fills in status, reason and errors; True if right."""
    if row.reason:
        return False
    row.allowed = judge.allowed
    try:
        outcome = run()
    except Exception as error:  # a peer may fail in any way; the row says how
        row.reason = first_line(error)
        return False
    row.errors, row.reason = judge.verdict(outcome)
    row.returned_bytes = sum(t.nbytes for t in outcome.values())
    row.status = "wrong" if row.reason else "timed"
    return not row.reason


def fill_times(rows: list[Row], runs: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> None:
    """Times what is in runs, interleaved, and fills in the rows of the same names."""
    rounds = interleave(runs, seconds, device)
    floor = next((row.peer for row in rows if row.status == "floor"), "")
    ours = next((row.peer for row in rows if row.status == "timed" and is_ours(row.peer)), "")
    for row in rows:
        if row.peer not in runs:
            continue
        row.samples = [times[row.peer] for times in rounds if row.peer in times]
        row.rounds = len(row.samples)
        row.seconds = statistics.median(row.samples)
        if row.rounds > 1:
            first, _, third = statistics.quantiles(row.samples, n=4, method="inclusive")
            row.quartiles = [first, third]
        row.to_floor, row.to_ours = ratio(rounds, row.peer, floor), ratio(rounds, row.peer, ours)


def fill_bytes(
    rows: list[Row], seconds: float, device: torch.device, weigh: Callable[[Row], tuple[int | None, str]]
) -> None:
    """Peak memory of what was timed; on a CPU not of peers whose step takes longer than a case's timing should."""
    for row in rows:
        if row.status == "timed" and row.seconds is not None:
            slow = device.type == "cpu" and row.seconds > 2 * seconds and not is_ours(row.peer)
            row.bytes, row.bytes_reason = (None, "too slow to run again") if slow else weigh(row)
