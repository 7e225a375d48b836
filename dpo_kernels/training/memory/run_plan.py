"""The memory of a run, told before it starts: by part, with what lowers it, and the longest pair that fits."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from dpo_kernels.training.layouts import PairTokens
from dpo_kernels.training.memory import lower
from dpo_kernels.training.memory.device_memory import Limit
from dpo_kernels.training.memory.lower import Chosen, Lowering
from dpo_kernels.training.memory.pairs import made_pairs
from dpo_kernels.training.memory.step_memory import LIBRARIES, PARTS, FakeRun, StepMemory, StepOptions
from dpo_kernels.units import in_words

STEP = 64  # tokens that the longest pair is known to
TRIES = 8  # steps that looking for it may take
NUMBERS_CHANGE = "what changes numbers is left to you: "


@dataclass(frozen=True)
class RunPlan:
    """What a step of the longest batch of a run holds at its peak.

    title: model, pairs and layout, in a line.
    options: what the run does about memory; memory: with them.
    limit: what the run may hold, None: nothing is known.
    alone: what each other thing to do about memory would leave, the best first.
    others: what options would leave that change the numbers of the run, by their names; the best first.
    chosen: what `--fit` chose, over options; None: it was not asked.
    longest: the longest pair that fits, with the lengths of prompt and answers in the same proportion; None: not asked,
        or none fits. positions: that the model has.
    flops_before: of a step before `--fit` chose.
    """

    title: str
    options: StepOptions
    memory: StepMemory
    limit: Limit | None = None
    alone: Sequence[tuple[Lowering, StepMemory]] = ()
    others: Sequence[tuple[str, StepMemory]] = ()
    chosen: Chosen | None = None
    longest: PairTokens | None = None
    positions: int | None = None
    flops_before: int = 0

    @property
    def reaches_positions(self) -> bool:
        """Whether it is the model that ends the longest pair, and not memory."""
        assert self.longest is not None
        return self.positions is not None and max(self.longest.sequences) > self.positions - STEP

    @property
    def fits(self) -> bool:
        return self.limit is None or self.memory.bytes <= self.limit.bytes

    def __str__(self) -> str:
        lines = [f"memory of a step: {self.title}", *_parts(self.memory)]
        if self.limit is not None:
            lines.append(f"  {in_words(self.limit.bytes):>10}  {self.limit.why}")
        if self.alone:
            lines.append("with one thing more, each alone:")
            lines += [f"  {in_words(lowered.bytes):>10}  {_buys(self, one, lowered)}" for one, lowered in self.alone]
        if self.others:
            lines.append("with other numbers, each alone:")
            lines += [f"  {in_words(other.bytes):>10}  {_gives(self, name, other)}" for name, other in self.others]
        if self.chosen is not None:
            lines += self.told_of_choice
        if self.longest is not None:
            prompt, chosen, rejected = self.longest
            by = f", as long as the model has positions ({self.positions:,})" if self.reaches_positions else ""
            lines.append(
                f"the longest pairs of this kind that fit: {prompt:,} tokens of prompt, answers of {chosen:,} and "
                f"{rejected:,}{by}"
            )
        return "\n".join(lines)

    @property
    def told_of_choice(self) -> list[str]:
        """In a line each, what `--fit` chose and what that costs."""
        assert self.chosen is not None
        lines = []
        before = self.memory
        for one, lowered in self.chosen.steps:
            price = lowered.flops / before.flops - 1 if before.flops else 0.0
            sizes = f"{in_words(before.bytes)} becomes {in_words(lowered.bytes)}"
            lines.append(f"--fit chose {one.option}: {sizes}, for {one.costs} ({price:+.0%} operations)")
            before = lowered
        if self.limit is not None and before.bytes > self.limit.bytes:
            more = in_words(before.bytes - self.limit.bytes)
            lines.append(f"--fit: by the plan that is {more} more than there is; {_numbers_change(self)}")
        return lines or ["--fit: it fits as it is"]

    def as_json(self) -> dict[str, Any]:
        def of(memory: StepMemory) -> dict[str, Any]:
            return {"bytes": memory.bytes, **asdict(memory), "parts": dict(memory.parts)}

        return {
            "title": self.title, "options": asdict(self.options), "memory": of(self.memory),
            "limit": None if self.limit is None else asdict(self.limit),
            "alone": [{"option": one.option, "costs": one.costs, "memory": of(memory)} for one, memory in self.alone],
            "others": [{"option": name, "memory": of(memory)} for name, memory in self.others],
            "chosen": None if self.chosen is None else {
                "options": asdict(self.chosen.options), "memory": of(self.chosen.memory),
                "steps": [{"option": one.option, "memory": of(memory)} for one, memory in self.chosen.steps],
            },
            "longest": None if self.longest is None else self.longest._asdict(),
        }  # fmt: skip


def too_little(plan: RunPlan, measured: int | None = None) -> str:
    """The sentence for a run that does not fit: by how much, and what buys how much.

    Args:
        measured: bytes that a step held where it was tried; None: the plan's.
    """
    assert plan.limit is not None
    needs = plan.memory.bytes if measured is None else measured
    how = "by the plan" if measured is None else "measured"
    buys = "; ".join(_buys(plan, one, lowered) for one, lowered in plan.alone)
    choose = f"{buys}; --fit chooses among them" if buys else "No option buys more at the same numbers"
    return (
        f"a step of the longest batch needs {in_words(needs)} ({how}), and there is {in_words(plan.limit.bytes)} "
        f"({plan.limit.why}): {in_words(needs - plan.limit.bytes)} too little. {choose}; {_numbers_change(plan)}. "
        "Nothing was trained, nothing is lost"
    )


def _buys(plan: RunPlan, one: Lowering, lowered: StepMemory) -> str:
    return f"{one.option} buys {in_words(plan.memory.bytes - lowered.bytes)} for {one.costs}"


def _gives(plan: RunPlan, name: str, other: StepMemory) -> str:
    return f"{name} buys {in_words(plan.memory.bytes - other.bytes)}"


def _numbers_change(plan: RunPlan) -> str:
    options = [_gives(plan, name, other) for name, other in plan.others]
    return NUMBERS_CHANGE + ", ".join([*options, "a smaller --max_length"])


def longest_pair(
    run: FakeRun, shape: PairTokens, options: StepOptions, budget: int, most: int | None, count: int = 1
) -> PairTokens | None:
    """The longest pair in the proportions of `shape` of which a step of `count` fits.

    Args:
        budget: bytes.
        most: tokens of a sequence that the model has positions for; None: no limit.
    """
    whole = max(shape.sequences)

    def scaled(tokens: int) -> PairTokens:
        return PairTokens(*(max(1, round(part * tokens / whole)) for part in shape))

    def needs(tokens: int) -> int:
        return run.step(made_pairs(*scaled(tokens), count), options).bytes

    low, high = STEP, None
    at_low = needs(low)
    if at_low > budget:
        return None
    tokens = max(2 * STEP, whole)
    for _ in range(TRIES):
        tokens = tokens // STEP * STEP if most is None else min(tokens, most) // STEP * STEP
        if tokens <= low:
            break
        size = needs(tokens)
        slope = (size - at_low) / (tokens - low)
        if size <= budget:
            low, at_low = tokens, size
        else:
            high = tokens
        guess = low + int((budget - at_low) / max(slope, 1e-9) * 0.999)
        if high is not None:
            guess = min(guess, high - STEP)
        if abs(guess - low) < STEP or (most is not None and low >= most // STEP * STEP):
            break
        tokens = guess
    return scaled(low)


def save_picture(
    run: FakeRun, shape: PairTokens, options: StepOptions, plan: RunPlan, path: Path, count: int = 1
) -> Mapping[int, StepMemory]:
    """Bytes by part against tokens of the longer answer with its prompt, up to the plan's; returns what is drawn."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = max(shape.sequences)
    found = {}
    for share in (0.125, 0.25, 0.5, 0.75, 1.0):
        size = PairTokens(*(max(1, round(part * share)) for part in shape))
        found[max(size.sequences)] = run.step(made_pairs(*size, count), options)
    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    # What does not grow at the bottom.
    names = [n for n in (LIBRARIES, *PARTS[:-1]) if any(memory.parts.get(n) for memory in found.values())]
    colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    axes.stackplot(
        [*found], [[memory.parts.get(name, 0) / 2**30 for memory in found.values()] for name in names], labels=names,
        colors=[colors[PARTS.index(name)] for name in names],
    )  # fmt: skip
    if plan.limit is not None and plan.limit.bytes < 4 * plan.memory.bytes:
        axes.axhline(plan.limit.bytes / 2**30, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"{in_words(plan.limit.bytes)}, {plan.limit.why}", (min(found), plan.limit.bytes / 2**30), xytext=(4, 3),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_xlim(min(found), whole)
    axes.set_ylim(0)
    axes.set_xlabel("tokens of a prompt with its longer answer")
    axes.set_ylabel("GiB at the peak of a step")
    axes.set_title(textwrap.fill(plan.title, 100), fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, reverse=True)  # in the order of the areas
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return found


def make_plan(
    run: FakeRun,
    pairs: Mapping[str, Tensor],
    title: str,
    options: StepOptions,
    limit: Limit | None = None,
    *,
    fits: bool = False,
    compares: bool = True,
) -> RunPlan:
    """The plan of a step of these pairs.

    Args:
        fits: whether `fit` shall choose. compares: whether each other thing to do about memory is tried alone.

    Raises:
        PlanError: a step cannot be gone through without numbers.
    """
    memory = run.step(pairs, options)
    alone = lower.each(run, pairs, options, memory) if compares else []
    chosen = lower.fit(run, pairs, options, limit.bytes) if fits and limit is not None else None
    return RunPlan(title, options, memory, limit, alone, chosen=chosen)


def _parts(memory: StepMemory) -> list[str]:
    lines = [f"  {in_words(memory.bytes):>10}  in all, {memory.tokens:,} tokens, {memory.flops / 1e12:,.2f} TFLOP"]
    lines += [f"  {in_words(size):>10}    {name}" for name, size in memory.parts.items()]
    return lines + ([f"  {in_words(memory.host):>10}  of host memory besides"] if memory.host else [])
