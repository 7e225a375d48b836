"""Every causal language model of transformers under a fused head, at a tiny size: is it right, or refused?

    python tests/breadth.py [--write] [model_type ...]

Each class is held to a twin without a fused head: log-probs, gradients of all parameters, the first loss, greedy
generation, saving and loading, a second fused head, and the model given back. --write writes docs/models.md. The exit
status is 1 where a class is wrong, cannot be built, or is refused other than `REFUSED` says.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in conftest.py
import tiny_models
import torch
import transformers
from torch import Tensor

from dpo_kernels import dpo_loss, reference
from dpo_kernels.training import FusedHead, HeadError
from dpo_kernels.training.loading import load_model
from dpo_kernels.training.output_head import accepted, find_head
from dpo_kernels.training.randomness import disable_dropout

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SECONDS = 120  # a class that takes longer hangs

# Refusals that have to be, by a part of their sentence.
REFUSED = {
    "is not causal": ("cpmant", "paligemma", "xlm", "xlnet"),
    "has parameters besides weight and bias": ("dory",),
    "found ModuleList": ("musicgen", "musicgen_melody"),
    "shared_kv_states cannot be None": ("gemma4_assistant", "gemma4_unified_assistant"),
    "labels are": ("prophetnet",),  # predicts several tokens ahead
    "axial_pos_shape": ("reformer",),  # is trained at one length alone, and its hashing is not causal
    "Exactly 1 of pixel_values": ("idefics",),
    "makes its routes random": ("phimoe",),
}

LOG_PROB_TOLERANCE = 1e-4  # of the largest logit, or of 1
GRADIENT_TOLERANCE = 1e-3  # of a gradient's largest number
FLOOR = 1e-4  # of the largest of all gradients: smaller ones are rounding


class Late(BaseException):
    """A class took too long; no Exception, which the check at start would take for a refusal."""


@dataclass
class Outcome:
    """What came of a class."""

    model_type: str
    name: str = ""  # of the class
    refusal: str = ""
    not_built: str = ""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if self.faults:
            return "wrong"
        return "not built" if self.not_built else "refused" if self.refusal else "right"

    @property
    def failure(self) -> str:
        """What is not as it has to be; "" where all is."""
        expected = next((part for part, types in REFUSED.items() if self.model_type in types), "")
        if self.faults or self.not_built:
            return "; ".join(self.faults) or f"cannot be built: {self.not_built}"
        if expected and expected not in self.refusal:
            return f"has to be refused ({expected}), is {self.refusal or 'not'}"
        return "" if expected else self.refusal

    def __str__(self) -> str:
        said = " ".join((self.refusal or self.not_built, *self.faults, *self.notes)).strip()
        return f"{self.kind:9} {self.model_type:24} {self.name} {said}".rstrip()


def check(model_type: str) -> Outcome:
    """All that a class is held to, up to a refusal."""
    outcome = Outcome(model_type)
    try:
        with _time_limit(), tiny_models.towers_stood_in_for():
            _check(outcome)
    except (Exception, Late) as error:
        outcome.faults.append(_sentence(error))
    return outcome


def _check(outcome: Outcome) -> None:
    try:
        model, twin = (tiny_models.build(outcome.model_type) for _ in range(2))
    except Exception as error:
        outcome.not_built = _sentence(error)
        return
    outcome.name = type(model).__name__
    attributes = set(vars(model))
    silenced = disable_dropout(model)
    try:
        head_class = type(find_head(model))
        FusedHead(model).check(model)
    except HeadError as error:
        outcome.refusal = str(error)
        return
    with_dropout = _own_logits(twin)
    disable_dropout(twin)
    own = _own_logits(twin)

    def attempt(what: str, do: Callable[..., None], *args: Any) -> None:
        try:
            do(*args)
        except AssertionError as error:
            outcome.faults.append(f"{what}: {error}")
        except Exception as error:
            outcome.faults.append(f"{what}: {_sentence(error)}")

    attempt("without dropout", _same_in_evaluation, own, with_dropout)
    attempt("causality", _causal, twin)
    attempt("log-probs and gradients", _log_probs_and_gradients, model, twin)
    attempt("generation", _generation, outcome, model, twin)
    attempt("saving and loading", _saving_and_loading, outcome, model, silenced)
    attempt("a second head, and back", _second_head, model, head_class, attributes, own)
    attempt("generation of the model given back", _generation, outcome, model, twin)
    attempt("the first loss", _first_loss, model, twin)
    attempt("head tied the other way", _other_ties, outcome)


def _same_in_evaluation(without: Tensor, with_dropout: Tensor) -> None:
    error = _largest(without - with_dropout)
    assert error == 0, f"turning dropout and jitter off moves the logits of evaluation by {error:.2e}"


def _causal(model: Any) -> None:
    ids = _batch()["input_ids"][:1]
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad():
        moved = _largest((_logits(model.eval(), ids) - _logits(model, other))[:, :-1])
    assert moved < 1e-4, f"another last token moves earlier logits by {moved:.2e}"


def _log_probs_and_gradients(model: Any, twin: Any) -> None:
    given = _batch()
    labels = given.pop("labels")
    fused = _trained(model)(**given, labels=labels, use_cache=False)["log_probs"]
    logits = _trained(twin)(**given, **accepted(twin, {"use_cache": False})).logits.float()
    own = torch.where(labels == -100, 0.0, reference.logits_to_log_probs(logits, labels))
    allowed = LOG_PROB_TOLERANCE * max(1.0, _largest(logits[given["attention_mask"] == 1]))
    error = _largest(fused - own)
    assert error <= allowed, f"log-probs differ by {error:.2e}, allowed {allowed:.2e}"
    assert _largest(own) > 0.1, "log-probs are all 0"
    weights = torch.linspace(-1.0, 1.0, labels.numel()).view_as(labels)
    for log_probs in (fused, own):
        (log_probs * weights).sum().backward()
    exact = {name: p.grad for name, p in twin.named_parameters()}
    floor = FLOOR * max(_largest(g) for g in exact.values() if g is not None)
    for name, parameter in model.named_parameters():
        found, true = (torch.zeros_like(parameter) if g is None else g for g in (parameter.grad, exact[name]))
        error, largest = _largest(found - true), _largest(true)
        assert error <= GRADIENT_TOLERANCE * max(largest, floor), (
            f"the gradient of {name} differs by {error:.2e}, its largest number is {largest:.2e}"
        )


def _generation(outcome: Outcome, model: Any, twin: Any) -> None:
    """Greedy, two prompts of which one is padded on the left; no token twice, or tied heads would repeat the last."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 5, "do_sample": False,
               "no_repeat_ngram_size": 1, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
    try:
        own = twin.eval().generate(ids.clone(), **options)
    except Exception:
        if NO_GENERATION not in outcome.notes:
            outcome.notes.append(NO_GENERATION)
        return
    made = model.eval().generate(ids.clone(), **options)
    assert own.shape == (2, 10), f"the twin makes {tuple(own.shape)} tokens of (2, 5)"
    assert torch.equal(made, own), f"makes {made.tolist()}, the twin {own.tolist()}"


NO_GENERATION = "does not generate itself"


def _saving_and_loading(outcome: Outcome, model: Any, silenced: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with silenced.as_they_were():
            model.save_pretrained(folder)
        try:
            loaded = load_model(folder)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            outcome.notes.append("what it saves is loaded by its own class alone, not by AutoModelForCausalLM")
            loaded = type(model).from_pretrained(folder)
    assert type(loaded) is type(model), f"a {type(loaded).__name__} is loaded"
    logits = _own_logits(model)
    error = _largest(_own_logits(loaded) - logits)
    assert error <= 1e-6 * max(1.0, _largest(logits)), f"the loaded model's logits differ by {error:.2e}"


def _second_head(model: Any, head_class: type, attributes: set[str], own: Tensor) -> None:
    given = _batch()
    before = model.eval()(**given, use_cache=False)["log_probs"]
    with FusedHead(model) as second:
        second.check(model)
        error = _largest(model.eval()(**given, use_cache=False)["log_probs"] - before)
        assert error == 0, f"log-probs differ by {error:.2e} from the first head's"
    assert type(find_head(model)) is head_class, f"the head is a {type(find_head(model)).__name__}"
    assert set(vars(model)) == attributes, f"the model keeps {sorted(set(vars(model)) ^ attributes)}"
    error = _largest(_own_logits(model) - own)
    assert error == 0, f"logits differ by {error:.2e} from those before"


def _first_loss(model: Any, ref: Any) -> None:
    """With the same model as reference: log 2, to the last bit."""
    given = _batch()
    for side in (model, ref):
        FusedHead(side).check(side)
    with torch.no_grad():
        frozen, policy = (side(**given, use_cache=False)["log_probs"] for side in (ref.eval(), model.train()))
    loss = dpo_loss(frozen, policy, given["labels"] != -100).loss
    log2 = torch.tensor(2.0).log()
    assert torch.equal(loss, log2), f"{loss.item():.9f}, log 2 is {log2.item():.9f}"


def _other_ties(outcome: Outcome) -> None:
    """The head tied to the embedding where it was not, or with a weight of its own where it was tied."""
    model, twin = (tiny_models.build(outcome.model_type, other_ties=True) for _ in range(2))
    for side in (model, twin):
        disable_dropout(side)
    FusedHead(model).check(model)
    _log_probs_and_gradients(model, twin)


def _batch() -> dict[str, Tensor]:
    """12 tokens, and 8 padded to 12; labels of the answers alone."""
    ids = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[1, 8:] = 0
    labels = ids.roll(-1, 1)
    labels[:, :3] = labels[:, -1] = labels[1, 7:] = -100
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def _trained(model: Any) -> Any:
    model.train()
    model.zero_grad()
    return model


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, **accepted(model, {"use_cache": False})).logits


def _own_logits(model: Any) -> Tensor:
    """In evaluation, without padding."""
    with torch.no_grad():
        return _logits(model.eval(), _batch()["input_ids"][:1])


def _largest(values: Tensor) -> float:
    """The largest absolute number, and inf for NaN."""
    return values.detach().abs().nan_to_num(float("inf")).max().item() if values.numel() else 0.0


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late(f"takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def page(outcomes: list[Outcome]) -> str:
    """docs/models.md."""
    text = [o for o in outcomes if o.model_type in tiny_models.CAUSAL]
    images = [o for o in outcomes if o.model_type not in tiny_models.CAUSAL]
    left_out = len({*tiny_models.IMAGES} - {*tiny_models.CAUSAL, *tiny_models.TEXT_ALONE})
    lines = [
        "# Which models are right under a fused head",
        "",
        f"Of {_counted(text)}. Of {len(images)} more classes, of images and text, which `AutoModelForImageTextToText` "
        f"loads and whose text is trained alone: {_counted(images).partition(': ')[2]}; {left_out} others of its "
        "mapping ask for an image, or have no tiny instance here, and are not tried. transformers "
        f"{transformers.__version__}, torch {torch.__version__.partition('+')[0]}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; `make breadth` writes this page.",
        "",
        "Right: a tiny random instance, held to an unfused twin, gives its log-probs and the gradients of all its "
        "parameters, with its head tied to the embedding and not, where it can be both; starts at a loss of exactly "
        "log 2; generates the twin's tokens, greedily, none twice, from a batch of two of which one is padded on the "
        "left; is saved and loaded with the same logits; takes a second `FusedHead`, and is given back as it was. "
        "Refused: `FusedHead.check` stops before the first step, with the sentence below.",
        "",
    ]
    for title, part in (("In the mapping of `AutoModelForCausalLM`", text), ("Of images and text", images)):
        lines += [f"## {title}", "", "| model type | class | |", "|---|---|---|"]
        for o in part:
            said = ", ".join((o.kind, *o.notes)) if o.kind != "not built" else "cannot be built here"
            lines.append(f"| {o.model_type} | {f'`{o.name}`' if o.name else ''} | {said} |")
        lines.append("")
    for title, kind, said in (
        ("Refusals", "refused", lambda o: o.refusal),
        ("What cannot be built here", "not built", lambda o: o.not_built),
        ("Faults", "wrong", lambda o: "; ".join(o.faults)),
    ):
        sentences: dict[str, list[str]] = collections.defaultdict(list)
        for o in outcomes:
            if o.kind == kind:
                sentences[said(o).replace(o.name or "\0", "(class)")].append(o.model_type)
        if sentences:
            lines += [f"## {title}", ""]
            lines += [f"- {', '.join(types)}: {sentence}" for sentence, types in sentences.items()] + [""]
    return "\n".join(lines)


def _counted(outcomes: list[Outcome]) -> str:
    counts = collections.Counter(o.kind for o in outcomes)
    said = {"right": "right", "refused": "refused", "not built": "cannot be built here", "wrong": "wrong"}
    parts = [f"{counts[kind]} {words}" for kind, words in said.items() if counts[kind] or kind in ("right", "refused")]
    return f"{len(outcomes)} entries of transformers' causal mapping: {', '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/models.md, where all classes are run")
    parser.add_argument("model_types", nargs="*", help="all, where none is given")
    args = parser.parse_args()
    if args.write and args.model_types:
        parser.error("--write is for all classes")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    start = time.monotonic()
    outcomes = []
    for model_type in args.model_types or (*tiny_models.CAUSAL, *tiny_models.TEXT_ALONE):
        outcomes.append(check(model_type))
        print(outcomes[-1], flush=True)
    if args.write:
        PAGE.write_text(page(outcomes), encoding="utf-8")
    counts = collections.Counter(o.kind for o in outcomes)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), f"in {time.monotonic() - start:.0f} s")
    failures = [f"{o.model_type}: {o.failure}" for o in outcomes if o.failure]
    print("\n".join(("", f"{len(failures)} failures:", *failures)) if failures else "no failure")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
