"""What happened in a run, in sentences made from its log alone, each with what to try."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dpo_kernels.training.report.metrics import CHANCE, LONGER, SHORTER, Log, figure, held_out, points

# What counts as something that happened; each is explained where it is used.
UNMOVED = 0.1  # nats that an answer's log-prob has moved by
FALLEN = 1.0  # nats: an answer that has lost them is less than half as likely as before (1/e)
RISEN = 0.02  # nats of a loss: more than the noise of some dozens of held-out pairs from one evaluation to the next
APART = 0.05  # share of pairs
WINDOW = 0.1  # share of the steps whose mean is taken for the start, and for the end


@dataclass(frozen=True)
class Options:
    """Of a run, what its sentences need; see `DPOConfig`. beta and learning_rate as numbers, the losses by name.

    starts_at_reference: the policy begins as its reference, which stays: then rewards are what training has changed.
    """

    beta: float = 0.1
    learning_rate: float = 1e-6
    loss_type: Sequence[str] = ("sigmoid",)
    aggregate: str = "sum"
    has_reference: bool = True
    is_adapted: bool = False
    starts_at_reference: bool = True

    @property
    def reward_of(self) -> float:
        """The reward of one nat; of beta 0 there is none."""
        return self.beta or math.nan


@dataclass(frozen=True)
class Finding:
    """kind: "good", "bad", or "note". said: what happened. advice: what to try; "" where there is nothing to mend."""

    kind: str
    said: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.said} {self.advice}".strip()


def findings(log: Log, options: Options | None = None) -> list[Finding]:
    """What a log says, the worst first; a good run gets its sentence too. Of a log without a step: nothing.

    Raises: nothing of what a log may hold: figures that are missing, NaN, one step, the rest of a run gone on with.
    """
    options = options or Options()
    if not any("loss" in entry for entry in log):
        return []
    if (broken := _not_finite(log)) is not None:
        return [broken]
    unmoved = _unmoved(log, options)  # then nothing else has happened
    rules = () if unmoved is not None else RULES
    found = [finding for rule in rules if (finding := rule(log, options)) is not None]
    found += [unmoved] if unmoved is not None else []
    if not any(finding.kind == "bad" for finding in found):
        found.insert(0, _good(log))
    return [*found, *_notes(log)]


def _not_finite(log: Log) -> Finding | None:
    for entry in log:
        if isinstance(loss := entry.get("loss"), float) and not math.isfinite(loss):
            return Finding(
                "bad", f"The loss was {loss} at step {entry.get('step', '?')}: no figure from there on means anything.",
                "Look at the pairs of that step, and try a third of the learning rate.",
            )  # fmt: skip
    return None


def _unmoved(log: Log, options: Options) -> Finding | None:
    """A margin of under 0.1 nats says that no answer became 10% likelier or less likely than its rival."""
    margins = [value for _, value in points(log, "rewards/margins")]
    if not margins or not max(map(abs, margins)) < UNMOVED * options.reward_of:
        return None
    steps = points(log, "loss")[-1][0]
    if steps <= 1:
        return Finding(
            "bad", "The run took one step, whose margin is 0: until then the policy is its reference.",
            "Train for more steps: --num_train_epochs, --max_steps.",
        )  # fmt: skip
    usual = (5e-6, 5e-5) if options.is_adapted else (5e-7, 5e-6)
    what = "adapters" if options.is_adapted else "whole models"
    rate = options.learning_rate
    advice = (
        f"DPO of {what} is usually run at {usual[0]:g} to {usual[1]:g}; try --learning_rate {usual[0]:g}."
        if rate < usual[0] else f"Try --learning_rate {3 * rate:.2g}, or more steps."
    )  # fmt: skip
    return Finding(
        "bad", f"The margin never left 0 (at most {max(map(abs, margins)):.1g} in {steps:,} steps): the policy is "
        f"still its reference. A learning rate of {rate:g} was too small for so many steps.", advice,
    )  # fmt: skip


def _diverged(log: Log, options: Options) -> Finding | None:
    losses = [value for _, value in points(log, "loss")]
    if len(losses) < 10 or not _end(losses) > _start(losses) + 0.1:
        return None
    return Finding(
        "bad", f"The loss rose from {_start(losses):.3f} to {_end(losses):.3f}: each step undid more than it did.",
        f"Try --learning_rate {options.learning_rate / 3:.1g}, with --warmup_steps, or --max_grad_norm.",
    )  # fmt: skip


def _overfitted(log: Log, options: Options) -> Finding | None:
    """The held-out loss rose again by more than noise, and that of training fell at the same time."""
    trained = points(log, "loss")
    for name, key in held_out(log, "loss").items():
        kept = points(log, key)
        if len(kept) < 2:
            continue
        best_step, best = min(kept, key=lambda point: point[1])
        last_step, last = kept[-1]
        before = [value for step, value in trained if step <= best_step] or [trained[0][1]]
        after = [value for step, value in trained if step > best_step]
        if not after or last - best < max(RISEN, 0.05 * abs(best)) or not _end(after) < _end(before):
            continue
        where = f"that of {name} " if name else ""
        if best_step == 0:
            return Finding(
                "bad", f"The held-out loss {where}was lowest before the first step ({best:.3f}) and rose to "
                f"{last:.3f} at step {last_step:,}, while the training loss fell: nothing that was learned here helps "
                "on other pairs.",
                f"Look whether the held-out pairs are of the same kind, and try --learning_rate "
                f"{options.learning_rate / 3:.1g}, a larger beta, or more pairs.",
            )  # fmt: skip
        return Finding(
            "bad", f"The held-out loss {where}was lowest at step {best_step:,} ({best:.3f}) and rose to {last:.3f} at "
            f"step {last_step:,}, while the training loss went on falling: the policy learned these pairs by heart.",
            f"Stop near step {best_step:,} (--load_best_model_at_end true --metric_for_best_model "
            f"{key} --greater_is_better false), or try fewer epochs, a smaller learning rate, or a larger beta.",
        )  # fmt: skip
    return None


def _not_carried_over(log: Log, options: Options) -> Finding | None:
    """Pairs that were trained on are ranked, others are not: within 0.05 of chance."""
    trained = [value for _, value in points(log, "rewards/accuracies")]
    for name, key in held_out(log, "rewards/accuracies").items():
        kept = points(log, key)
        if kept and trained and kept[-1][1] < CHANCE + APART and _end(trained) > CHANCE + 5 * APART:
            where = f" of {name}" if name else ""
            return Finding(
                "bad", f"Pairs that were trained on are ranked ({_end(trained):.2f} of them), held-out ones{where} no "
                f"better than by chance ({kept[-1][1]:.2f}): what was learned does not carry over.",
                "Look whether the held-out pairs are of the same kind, and try more pairs and fewer epochs.",
            )  # fmt: skip
    return None


def _displaced(log: Log, options: Options) -> Finding | None:
    """Likelihood displacement (Razin et al. 2024, arXiv:2410.08847)."""
    for where, fell, more in _losses_of_log_prob(log, options):
        if not (fell > (FALLEN if options.aggregate == "sum" else FALLEN / 10) and more > fell):
            continue
        unit = "nats" if options.aggregate == "sum" else "nats a token"
        has_sft = "sft" in options.loss_type
        return Finding(
            "bad", f"The chosen answers{where} have themselves become less likely, by {fell:.1f} {unit}, and the "
            f"rejected ones by {more:.1f} (likelihood displacement): the probability went to answers that are neither.",
            "Try a larger weight of sft in --loss_weights, or a smaller learning rate." if has_sft else
            "Try the chosen answers' own likelihood in the loss (--loss_type sigmoid sft --loss_weights 1.0 0.2), a "
            "smaller learning rate, or a larger beta.",
        )  # fmt: skip
    return None


def _by_length(log: Log, options: Options) -> Finding | None:
    """Of held-out pairs, those whose longer answer is preferred are ranked, the others are ranked the wrong way; or the
    other way round. (Trained as much as tested on, either alone is no sign: all chosen answers may be the longer ones.)
    """
    for name, longer in held_out(log, LONGER).items():
        shorter = longer.removesuffix(LONGER) + SHORTER
        shares = [points(log, key) for key in (longer, shorter)]
        if not all(shares):
            continue
        if_longer, if_shorter = (share[-1][1] for share in shares)
        low, high = sorted((if_longer, if_shorter))
        if low > CHANCE or high < CHANCE + 4 * APART:
            continue
        side = "longer" if if_longer > if_shorter else "shorter"
        where = f" of {name}" if name else ""
        return Finding(
            "bad", f"Rewards go by length: of the held-out pairs{where} whose chosen answer is the longer one "
            f"{if_longer:.2f} are ranked right, of those whose chosen answer is the shorter one {if_shorter:.2f}. The "
            f"policy learned to write {side} answers.",
            "Try pairs of balanced lengths, --ld_alpha 0.5 (LD-DPO), or a loss of means a token: --loss_type "
            "sigmoid_norm.",
        )  # fmt: skip
    return None


def _good(log: Log) -> Finding:
    parts = []
    for key, name in (("logps/accuracies", "ranking accuracy"), ("rewards/accuracies", "reward accuracy")):
        for set_name, own in held_out(log, key).items():
            kept = points(log, own)
            if not kept:
                continue
            of = f" of {set_name}" if set_name else ""
            if key.startswith("logps") and len(kept) > 1:
                parts.append(f"held-out {name}{of} went from {kept[0][1]:.2f} to {kept[-1][1]:.2f}")
            else:
                parts.append(f"held-out {name}{of} is {kept[-1][1]:.2f}")
    losses, margins = ([value for _, value in points(log, key)] for key in ("loss", "rewards/margins"))
    if len(losses) > 1:
        parts.append(f"on the trained pairs the loss went from {losses[0]:.3f} to {_end(losses):.3f}")
    if margins:
        parts.append(f"the margin is {figure('rewards/margins', _end(margins))}")
    told = "; ".join(parts)
    learned = _learned(log)
    if learned:
        return Finding("good", f"The policy tells chosen from rejected answers: {told}.")
    if not told:
        return Finding("note", "The log has no figures to judge by.")
    return Finding(
        "note", f"Nothing went wrong that the log would show, and not much happened: {told}.",
        "Try more steps, or a larger learning rate.",
    )  # fmt: skip


def _learned(log: Log) -> bool:
    """Whether pairs are ranked better than by chance: held-out ones, or, where there are none, those trained on."""
    keys = [*held_out(log, "rewards/accuracies").values()] or ["rewards/accuracies"]
    ends = [_end([value for _, value in found]) if key == "rewards/accuracies" else found[-1][1]
            for key in keys if (found := points(log, key))]  # fmt: skip
    return bool(ends) and min(ends) > CHANCE + APART


def _notes(log: Log) -> Iterator[Finding]:
    first = min(step for step, _ in points(log, "loss"))
    if not held_out(log, "loss"):
        yield Finding("note", "No pairs were held out: how the policy does on others, this run does not say.",
                      "Give --eval_size 0.1 --eval_strategy epoch.")  # fmt: skip
    if first > 1 and first > _spacing(log):
        yield Finding("note", f"The log begins at step {first:,}: what came before is not in these sentences.")


def _spacing(log: Log) -> int:
    """The largest distance of two logged steps that follow one another: what a first step may be at."""
    steps = [step for step, _ in points(log, "loss")]
    return max((later - step for step, later in itertools.pairwise(steps)), default=steps[0])


def _losses_of_log_prob(log: Log, options: Options) -> Iterator[tuple[str, float, float]]:
    """What is told of, and by how many nats the chosen and the rejected answers became less likely: held-out ones if
    there are any, else those of the last steps. Where the policy starts at a reference that stays, that is -reward /
    beta; elsewhere it is known of what was evaluated twice."""
    both = ("chosen", "rejected")
    if not (options.has_reference and options.starts_at_reference):
        for name, key in held_out(log, "logps/chosen").items():
            kept = [points(log, key.removesuffix("chosen") + side) for side in both]
            if all(kept):
                fell, more = (side[0][1] - side[-1][1] for side in kept)
                yield f" of {name}" if name else "", fell, more
        return
    evaluated = held_out(log, "rewards/chosen")
    for name, key in (evaluated or {"": "rewards/chosen"}).items():
        last = [[value for _, value in points(log, key.removesuffix("chosen") + side)] for side in both]
        ends = [(values[-1:] if evaluated else values) for values in last]
        fell, more = (-_end(values) / options.reward_of for values in ends)
        yield f" of {name}" if name else "", fell, more


def _start(values: Sequence[float]) -> float:
    return _mean(values[: max(1, round(WINDOW * len(values)))])


def _end(values: Sequence[float]) -> float:
    """NaN where there is none."""
    return _mean(values[-max(1, round(WINDOW * len(values))) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


RULES: tuple[Callable[[Log, Options], Finding | None], ...] = (
    _diverged, _overfitted, _not_carried_over, _displaced, _by_length,
)  # fmt: skip
