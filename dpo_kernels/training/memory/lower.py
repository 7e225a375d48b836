"""What lowers the memory of a step and leaves its gradients exact, the cheapest in time first; and the choice of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dpo_kernels.training.memory import checkpointing
from dpo_kernels.training.memory.step_memory import FakeRun, PlanError, StepMemory, StepOptions

SMALL_HEAD = 256 * 2**20  # bytes: a budget at which the head is nearly as fast (docs/memory.md)
WORTH = 0.02  # of a step's bytes: what a part has to buy to be chosen


@dataclass(frozen=True)
class Lowering:
    """One thing that can be done about memory.

    option: as on the command line. change: of a step's options, None where it cannot be done or is done already.
    costs: in words.
    """

    option: str
    change: Callable[[FakeRun, int, StepOptions], StepOptions | None]
    costs: str


@dataclass(frozen=True)
class Chosen:
    """What was chosen. steps: option and what a step holds with it and all before it."""

    options: StepOptions
    memory: StepMemory
    steps: tuple[tuple[Lowering, StepMemory], ...]


def _precompute(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    useful = run.can_precompute and run.scores and run.reference is not None and not now.precompute_ref_log_probs
    return replace(now, precompute_ref_log_probs=True) if useful else None


def _small_head(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    useful = now.memory_budget is None or now.memory_budget > SMALL_HEAD
    return replace(now, memory_budget=SMALL_HEAD) if useful else None


def _checkpointing(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    keeps_a_cache = run.layout.attention == "cache"  # which layers that are run again do not
    possible = checkpointing.is_possible(run.policy) and not keeps_a_cache
    return replace(now, gradient_checkpointing=True) if possible and not now.gradient_checkpointing else None


def _tiles(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    return replace(now, mlp_tiles="auto") if now.mlp_tiles is None and run.can_tile else None


def _offloading(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    useful = run.device.type != "cpu" and not now.activation_offloading
    return replace(now, activation_offloading=True) if useful else None


def _pairs(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    useful = run.can_split and pairs > 1 and (now.answers_at_once or 2 * pairs) > 2
    return replace(now, answers_at_once=2) if useful else None


def _answers(run: FakeRun, pairs: int, now: StepOptions) -> StepOptions | None:
    useful = run.can_split and run.can_bucket and now.answers_at_once != 1
    return replace(now, answers_at_once=1, bucketed=True) if useful else None


LOWERINGS = (
    Lowering("--precompute_ref_log_probs", _precompute, "one pass of the reference before training"),
    Lowering("--memory_budget 256MiB", _small_head, "up to one product more in the head"),
    Lowering("--activation_offloading", _offloading, "copies to the host and back, beside the step"),
    Lowering("--answers_at_once 2", _pairs, "one forward more, less that of a pair"),
    Lowering("--gradient_checkpointing", _checkpointing, "one forward more"),
    Lowering("--mlp_tiles auto", _tiles, "the MLPs' forward once more"),
    Lowering("--answers_at_once 1 --layout bucketed", _answers, "one forward more, less that of an answer; "
             "a prompt is run for each answer"),
)  # fmt: skip


def each(
    run: FakeRun, pairs: Mapping[str, Tensor], now: StepOptions, memory: StepMemory
) -> list[tuple[Lowering, StepMemory]]:
    """What a step would hold with each of them alone, of those that buy something; the best first."""
    count = len(pairs["x_chosen"])
    found = []
    for lowering in LOWERINGS:
        if (changed := lowering.change(run, count, now)) is not None:
            lowered = _step(run, pairs, changed)
            if lowered is not None and lowered.bytes < (1 - WORTH) * memory.bytes:
                found.append((lowering, lowered))
    return sorted(found, key=lambda one: one[1].bytes)


def fit(run: FakeRun, pairs: Mapping[str, Tensor], now: StepOptions, budget: int) -> Chosen:
    """The cheapest of them with which a step fits the budget, one put on another; all that buy anything, if none does.

    Args:
        budget: bytes.
    """
    memory = run.step(pairs, now)
    count = len(pairs["x_chosen"])
    begin, steps = now, []
    for lowering in LOWERINGS:
        if memory.bytes <= budget:
            break
        if (changed := lowering.change(run, count, now)) is None:
            continue
        lowered = _step(run, pairs, changed)
        if lowered is not None and lowered.bytes < (1 - WORTH) * memory.bytes:
            now, memory = changed, lowered
            steps.append((lowering, lowered))
    if memory.bytes <= budget:
        now, memory, steps = _without_the_needless(run, pairs, begin, budget, steps, (now, memory))
    return Chosen(now, memory, tuple(steps))


def _step(run: FakeRun, pairs: Mapping[str, Tensor], options: StepOptions) -> StepMemory | None:
    """None: it cannot be run so, as where the head's least is more than its budget."""
    try:
        return run.step(pairs, options)
    except PlanError:
        raise
    except ValueError:
        return None


def _without_the_needless(
    run: FakeRun,
    pairs: Mapping[str, Tensor],
    begin: StepOptions,
    budget: int,
    steps: list[tuple[Lowering, StepMemory]],
    found: tuple[StepOptions, StepMemory],
) -> tuple[StepOptions, StepMemory, list[tuple[Lowering, StepMemory]]]:
    """Leaves out what is not needed beside what came after it, the dearest first."""
    count = len(pairs["x_chosen"])
    for left_out in reversed(steps[:-1]):
        kept = [lowering for lowering, _ in steps if lowering is not left_out[0]]
        now, again = begin, []
        for lowering in kept:
            changed = lowering.change(run, count, now)
            if changed is None:
                continue
            lowered = _step(run, pairs, changed)
            if lowered is not None:
                now = changed
                again.append((lowering, lowered))
        if again and again[-1][1].bytes <= budget:
            steps, found = again, (now, again[-1][1])
    return *found, steps
