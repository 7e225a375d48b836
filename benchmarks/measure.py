"""Verify, then time: every peer of a case on the same inputs, in interleaved rounds. A wrong result is never timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import MIB, Case, Inputs, make_inputs
from benchmarks.judge import Judge, Outcome
from benchmarks.peak_memory import Prepared, peak_bytes
from benchmarks.peers import PEERS, Adapter, Peer, default_impl, first_line, floor_name, is_ours, make_floor, peers_of
from dpo_kernels import plan

MIN_ROUNDS, MAX_ROUNDS = 5, 15


@dataclass
class Row:
    """What is known of one peer in one case.

    status: "timed"; "floor"; "weighed" (memory alone); "wrong"; "failed" (it was tried, and raised); "unavailable" (it
    cannot be tried here). The last three have a reason, and no time.
    seconds: median over `rounds` interleaved rounds, `quartiles` their first and third quartile; `samples` all of them.
    to_floor, to_ours: medians of the ratios within the same round, this peer's time over the other's.
    bytes: held at the second step's peak beyond the inputs, gradients included; first_bytes: at the first step's, with
    what libraries take once; a reason where they could not be measured. returned_bytes: outputs and gradients.
    predicted_bytes: what dpo_kernels plans to hold beyond inputs and those; library_bytes: the part of it that is an
    allowance for libraries and threads.
    mode, gemms: the plan's, for ours; for all others gemms is what the case needs.
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
    first_bytes: int | None = None
    bytes_reason: str = ""
    returned_bytes: int | None = None
    predicted_bytes: int | None = None
    library_bytes: int | None = None
    mode: str = ""
    gemms: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)

    def fail(self, status: str, reason: str) -> None:
        """It has a reason now, and no time."""
        self.status, self.reason = status, reason
        self.seconds = self.to_floor = self.to_ours = None
        self.quartiles, self.samples, self.rounds = [], [], 0


# What `contest` runs of a peer, once to verify and then to time; what it verifies is returned.
Step = Callable[[], Outcome]


class Ring:
    """Where peers meet: the inputs of a case, watched. Peers without common inputs meet in this one."""

    def restore(self) -> bool:
        """Puts the inputs back as they were; whether they had been changed."""
        return False

    def change(self) -> Judge:
        """Changes values in place, so that a result that was kept is wrong, and returns the judge of the new ones."""
        raise NotImplementedError


class InputsRing(Ring):
    def __init__(self, case: Case, inputs: Inputs, judge: Judge) -> None:
        self.case, self.inputs, self.judge = case, inputs, judge
        self._save()

    def _save(self) -> None:
        self.saved = self.inputs.copy(None).tensors()

    def restore(self) -> bool:
        tensors = self.inputs.tensors()
        changed = [name for name, t in tensors.items() if not torch.equal(t, self.saved[name])]
        for name in changed:
            tensors[name].detach().copy_(self.saved[name])
        return bool(changed)

    def change(self) -> Judge:
        self.restore()  # whoever may have changed them while it was timed
        self.inputs.change()
        self._save()
        return self.judge.changed(self.case)


def contest(
    rows: Sequence[Row], steps: Mapping[str, Step], judge: Judge, ring: Ring, seconds: float, device: torch.device
) -> None:
    """Verifies the rows that have no reason yet, times those that are right, and verifies those again on other values.

    Args:
        rows: to be filled in; one of status "floor" is timed without being verified.
        steps: by the row's peer.
        seconds: about how long the timing takes together, beyond its first MIN_ROUNDS rounds.
    """
    for row in rows:
        if not row.reason:
            verify(row, steps[row.peer], judge, ring)
    right = {row.peer: row for row in rows if row.status in ("timed", "floor")}
    rounds, failures = interleave({name: steps[name] for name in right}, seconds, device)
    for name, reason in failures.items():
        right[name].fail("failed", f"while it was timed: {reason}")
    again = ring.change()
    for row in right.values():
        if row.status == "timed":
            verify(row, steps[row.peer], again, ring, "after it was timed, on other values: ")
    fill_times(rows, rounds)


def verify(row: Row, step: Step, judge: Judge, ring: Ring, when: str = "") -> None:
    """Runs a step once and fills in errors and status, and the reason unless it is right."""
    try:
        outcome = step()
    except Exception as error:  # a peer may fail in any way; the row says how
        row.fail("failed", when + first_line(error))
        return
    if ring.restore():
        row.fail("wrong", when + "it changes its inputs")
        return
    if row.status == "floor":
        return
    errors, wrong = judge.verdict(outcome, is_ours(row.peer))
    row.errors = row.errors or errors
    row.allowed = judge.allowed_ours if is_ours(row.peer) else judge.allowed
    row.returned_bytes = sum(t.nbytes for t in outcome.values())
    if wrong:
        row.fail("wrong", when + wrong)
    else:
        row.status = "timed"


def interleave(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Times every function once a round, each round starting with another one.

    All play until `seconds` are used up, and MIN_ROUNDS rounds at least; whoever took 5 x `seconds` alone sits out. A
    function that raises plays no more.

    Returns:
        A dict of seconds a round, and why functions raised.
    """
    spent = dict.fromkeys(runs, 0.0)
    failures: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    while len(rounds) < MAX_ROUNDS and (len(rounds) < MIN_ROUNDS or sum(spent.values()) < seconds):
        part = [name for name in runs if spent[name] < 5 * seconds and name not in failures]
        if not part:
            break
        first = len(rounds) % len(part)
        times: dict[str, float] = {}
        for name in part[first:] + part[:first]:
            try:
                synchronize(device)
                start = time.perf_counter()
                runs[name]()
                synchronize(device)
            except Exception as error:
                failures[name] = first_line(error)
                continue
            times[name] = time.perf_counter() - start
            spent[name] += times[name]
        rounds.append(times)
    return rounds, failures


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(rounds: Sequence[dict[str, float]], name: str, other: str) -> float | None:
    """The median of name / other over the rounds in which both took part."""
    both = [times[name] / times[other] for times in rounds if name in times and other in times]
    return statistics.median(both) if both else None


def fill_times(rows: Sequence[Row], rounds: list[dict[str, float]]) -> None:
    """Times and ratios of the rows that are still right."""
    right = [row for row in rows if row.status in ("timed", "floor")]
    floor = next((row.peer for row in right if row.status == "floor"), "")
    ours = next((row.peer for row in right if is_ours(row.peer)), "")
    for row in right:
        row.samples = [times[row.peer] for times in rounds if row.peer in times]
        row.rounds = len(row.samples)
        row.seconds = statistics.median(row.samples)
        if row.rounds > 1:
            first, _, third = statistics.quantiles(row.samples, n=4, method="inclusive")
            row.quartiles = [first, third]
        row.to_floor, row.to_ours = ratio(rounds, row.peer, floor), ratio(rounds, row.peer, ours)


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
    peers = peers_of(case) if peers is None else peers
    rows = [new_row(case, peer, device) for peer in peers]
    if case.timed:
        made, judge = problem(replace(case, name="", memory_budget=None), device)
        inputs = made.copy(case.memory_budget)
        floor = Row(asdict(case), floor_name(case), "floor", gemms=case.needed_gemms)
        rows = [floor, *rows]
        steps = {peer.name: partial(step, peer.adapters[case.level], case, inputs) for peer in peers}
        contest(rows, {**steps, floor.peer: floor_step(case, inputs)}, judge, InputsRing(case, inputs, judge),
                seconds, device)  # fmt: skip
    weigh(rows, case, device, 2 if case.timed else 1, prepare)
    return rows


def new_row(case: Case, peer: Peer, device: torch.device) -> Row:
    """What is known before it runs."""
    row = Row(asdict(case), peer.name, "unavailable", peer.unavailable(device) or "", peer.notes(case))
    row.gemms = case.needed_gemms
    if is_ours(peer.name) and not row.reason:
        row.marks.insert(0, f"impl {peer.impl or default_impl(device)}")
        if case.level != "logits":
            describe_plan(row, case, device)
    if not row.reason and not case.timed:
        row.status = "weighed"
        row.marks.append("memory alone: not verified, not timed")
    return row


def describe_plan(row: Row, case: Case, device: torch.device) -> None:
    """What dpo_kernels plans; its bytes where the case is one call."""
    try:
        planned = plan(
            case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
            memory_budget=case.memory_budget, device=device.type, labels=case.tokens,
        )  # fmt: skip
    except ValueError as error:
        row.fail("failed", first_line(error))
        return
    row.mode, row.gemms = planned.mode, planned.gemms + (case.level == "dpo")
    if case.level == "hidden":
        row.predicted_bytes, row.library_bytes = planned.bytes, planned.memory["libraries and threads"]


@lru_cache(maxsize=1)  # the points of the budget curve share one
def problem(case: Case, device: torch.device) -> tuple[Inputs, Judge]:
    inputs = make_inputs(case, device)
    return inputs, Judge.of(case, inputs)


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


def floor_step(case: Case, inputs: Inputs) -> Step:
    """The floor as a step: its tensors are made when it runs for the first time."""
    made: list[Callable[[], None]] = []

    def run() -> Outcome:
        if not made:
            made.append(make_floor(case, inputs))
        made[0]()
        return {}

    return run


def clear(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def prepare(device: torch.device, case: Case, name: str) -> Prepared:
    """A peer's step of a case, and what frees the gradients that it left: for `peak_bytes`."""
    peer = next((p for p in PEERS if p.name == name), None)
    if peer is None:
        raise LookupError(f"{name} is none of PEERS, where a process of its own looks for it")
    inputs = make_inputs(replace(case, inputs="noise"), device)  # quicker to make, and the bytes are the same
    return partial(step, peer.adapters[case.level], case, inputs), lambda: clear(inputs.leaves().values())


def is_weighed(row: Row, case: Case) -> bool:
    return case.weighed is None or row.peer in case.weighed


def weigh(
    rows: Sequence[Row], case: Case, device: torch.device, steps: int, prepare: Callable[..., Prepared], *more: Any
) -> None:
    """Peak memory of what was timed and of what is only weighed. prepare is called with device, case, peer, *more.

    Ours fails if its first step, which has the library's share in it, holds more than its budget.
    """
    for row in rows:
        if row.status == "timed" and not is_weighed(row, case):
            row.bytes_reason = "not weighed in this case"
    rows = [row for row in rows if row.status in ("timed", "weighed") and is_weighed(row, case)]
    # Processes of their own hold what they hold whatever runs beside them; on a GPU there is only this one.
    with ThreadPoolExecutor(1 if device.type == "cuda" else 2) as pool:
        weighed = list(pool.map(lambda row: peak_bytes(device, steps, prepare, case, row.peer, *more), rows))
    for row, (held, row.bytes_reason) in zip(rows, weighed, strict=True):
        if not held:
            continue
        row.returned_bytes, row.first_bytes = held[0].returned, held[0].peak
        row.bytes = held[1].peak if steps > 1 else None
        budget, beyond = case.memory_budget, row.first_bytes - row.returned_bytes
        if is_ours(row.peer) and budget is not None and beyond > budget:
            row.fail("wrong", f"its first step holds {beyond / MIB:.1f} MiB, its budget is {budget / MIB:.1f} MiB")
