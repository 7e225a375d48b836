"""The check at start: a model that would be trained wrong is refused before its first step.

What a model does behind its head (a scale, a softcap) is measured on a probe, not guessed from names in a config. Then
the fused log-probs are held to the model's own logits, in values and in gradients, the model has to be causal, and to
compute in training what it computes in evaluation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels import reference
from dpo_kernels.call import Transform
from dpo_kernels.dtensors import local_part
from dpo_kernels.training.head_adapter import is_lora, low_rank_of, own_names, parameters_of
from dpo_kernels.training.output_head import Fused, HeadError, OutputHead, Request, accepted, find_head
from dpo_kernels.training.partitioned import whole

TOKENS = 8
JITTER = re.compile(r"jitter")  # what configs call noise of routers
ROUTED = 64  # tokens to see a router by
ROWS = 4096  # of the head's weight, whose gradients are compared
# Where the probe looks at what stands behind the head: small enough for a slope, large enough for a cap.
PROBE = (1e-4, -1e-4, 0.5, -0.5, 3.0, -3.0, 20.0, -20.0, 200.0, -200.0, 1e9, -1e9)
# A model rounds its logits to its dtype, we do not: what the check allows, in roundings of the largest logit.
ROUNDINGS = 3.0


def check_head(fused: Fused, model: nn.Module, deterministic: bool = True) -> None:
    """Measures what stands behind the head into `fused.transform`, then compares.

    Runs the model four times forward on two sequences of 8 tokens; on every process alike, where there are several.
    Weights, mode and random numbers are left as they were.

    Args:
        model: the model that was fused, or what now wraps it.
        deterministic: whether training has to compute what evaluation does (dropout is off).

    Raises:
        HeadError: fused log-probs or their gradients are not those of the model's own logits; a later token changes an
            earlier log-prob; training mode computes something else than evaluation, or twice not the same; behind the
            head stands what is no scale and no softcap; the model does not run on tokens alone.
    """
    training = {module: module.training for module in model.modules()}
    name = type(model).__name__
    try:
        with random_numbers_kept():
            _check(fused, model, deterministic)
    except HeadError:
        raise
    except Exception as error:  # a model's code may raise anything on what it was not made for
        raise HeadError(
            f"{name} does not run as a causal language model on tokens alone: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _check(fused: Fused, model: Any, deterministic: bool) -> None:
    device = next(model.parameters()).device
    ids = probe_ids(fused.vocab_size, device).repeat(2, 1)
    labels = ids.roll(-1, 1)
    ids[1, -1] = (ids[0, -1] + 1) % fused.vocab_size  # the same but for its last token
    name = type(model).__name__
    model.eval()
    with torch.no_grad():
        fused.transform = Transform()
        fused.transform = measure_transform(fused, model, ids[:1])
        log_probs = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
        with fused.asking(Request(keeps_hidden=True)) as request:
            logits = logits_of(model(input_ids=ids, **accepted(model, {"use_cache": False})))
        hidden = request.hidden
        if logits.shape[-1] != fused.vocab_size:
            raise HeadError(
                f"the model's logits are {tuple(logits.shape)}, its head's weight has {fused.vocab_size} rows"
            )
        own = reference.logits_to_log_probs(logits.float(), labels)
        allowed = _allowed(model, logits)
        error = (own - log_probs).abs().max().item()
        if not error <= allowed:
            raise HeadError(
                f"the fused head would train {name} wrong: on {TOKENS} tokens its log-probs differ from those of the "
                f"model's own logits by {error:.2e}, where rounding explains {allowed:.2e} (measured behind the head: "
                f"{fused.transform}); please report the model's class"
            )
        moved = (log_probs[0] - log_probs[1])[:-1].abs().max().item()
        if not moved <= allowed:
            raise HeadError(
                f"{name} is not causal: another last token moves earlier log-probs by {moved:.2e} (rounding explains "
                f"{allowed:.2e}), so that it reads what it is asked to predict; set is_decoder in its config, or give "
                "a causal model"
            )
        if deterministic:
            if jitter := next(numbers_named(model, JITTER), None):
                raise HeadError(
                    f"{name} has {jitter[1]} {jitter[2]:g}, which makes its routes random in training, so that policy "
                    "and reference would not start equal; set it to 0 in its config where evaluation does without it"
                )
            if has_experts(model):  # what is random in a router shows where scores are near one another
                ids = probe_ids(fused.vocab_size, device, ROUTED).repeat(2, 1)
                labels = ids.roll(-1, 1)
                log_probs = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
            model.train()
            trained = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
            for what, difference in (
                ("computes something else in training than in evaluation", trained - log_probs),
                ("computes something else each time in training", (trained[0] - trained[1])[: TOKENS - 1]),
            ):
                largest = difference.abs().max().item()
                if not largest <= allowed:
                    raise HeadError(
                        f"{name} {what}: its log-probs differ by {largest:.2e} (rounding explains {allowed:.2e}), so "
                        "that policy and reference would not start equal; turn off what is random in it (dropout, "
                        "jitter) in its config"
                    )
    if hidden is not None:
        with whole(find_head(model).parameters()):
            _check_gradients(fused, model, hidden)


def numbers_named(model: nn.Module, names: re.Pattern[str]) -> Iterator[tuple[Any, str, float, bool]]:
    """Holders and names of numbers that are not 0, and whether the holder is a config."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for holder in (*model.modules(), *configs.values()):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, float) and value != 0.0 and names.search(name):
                yield holder, name, value, id(holder) in configs


def has_experts(model: Any) -> bool:
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    numbers = getattr(text, "__dict__", {}).items()
    return any("expert" in name and isinstance(value, int | list) and value not in (0, 1) for name, value in numbers)


def _check_gradients(fused: Fused, model: Any, hidden: Tensor) -> None:
    """The head's own class, asked what it computes, against what the fused head takes it for: h W^T + b.

    Of the first rows of the weight, so that a large vocabulary costs no more than a small one; of those that are here,
    where it is split over ranks.
    """
    head: Any = find_head(model)
    assert isinstance(head, OutputHead)
    # Without the rows beyond; an adapter's a has none of the vocabulary. Its b is 0 at the start, which would hide a.
    weights = {name: local_part(p.detach()) for name, p in parameters_of(head).items()}
    weights = {name: (p if "lora_A" in name else p[:ROWS]).clone() for name, p in weights.items()}
    weights = {name: torch.randn_like(p) / 8 if "lora_B" in name else p for name, p in weights.items()}
    weight, bias = own_names(head)
    rows = len(weights[weight])
    if rows == 0:
        return  # more ranks than rows
    labels = torch.arange(hidden[..., 0].numel(), device=hidden.device).view(hidden.shape[:-1]) % rows
    upstream = torch.linspace(-1.0, 1.0, labels.numel(), device=hidden.device).view_as(labels)
    t = fused.transform

    in_training: Any = head.train()
    alone = _WithoutHooks(head)
    if is_lora(head):
        in_training.lora_dropout.eval()  # whether it is on is looked at elsewhere

    def own(x: Tensor, given: dict[str, Tensor]) -> Tensor:
        with fused.asking(Request(alone=True)):
            named = {f"head.{name}": value for name, value in given.items()}
            z = torch.func.functional_call(alone, named, (x,)).float() * t.logit_scale
        z = z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)
        return reference.logits_to_log_probs(z / t.temperature, labels)

    def taken(x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return fused.token_stats(x, given[weight], labels, given.get(bias), low_rank_of(head, given)).log_probs

    found: list[dict[str, Tensor]] = []
    for compute in (own, taken):
        given = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
        inputs = {"hidden": hidden.detach().clone().requires_grad_(), **given}
        with torch.enable_grad():
            total = (compute(inputs["hidden"], given) * upstream).sum()
            found.append(dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True)))
    bound = max(8 * ROUNDINGS * torch.finfo(narrowest(model)).eps, 1e-3)
    for name, exact in found[0].items():
        largest = exact.abs().max().item()
        error = (found[1][name] - exact).abs().max().item()
        if not error <= bound * largest:
            raise HeadError(
                f"the output head {type(head).plain.__name__} of {type(model).__name__} does something to its {name} "
                f"that is no plain product: the gradient of {name} would be off by {error / largest:.1%} of its "
                "largest value; train this model without a fused head"
            )


class _WithoutHooks(nn.Module):
    """A head whose forward is asked for alone: hooks of FSDP and of tensor parallelism would take up other ranks."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head.forward(x)


def measure_transform(fused: Fused, model: Any, ids: Tensor) -> Transform:
    """logit_scale and softcap from what the model's forward makes of known numbers in place of its logits.

    Raises:
        HeadError: it is no scale and no softcap, or has parameters.
    """
    name = type(model).__name__
    probe = torch.tensor(PROBE, dtype=torch.float64 if ids.device.type in ("cpu", "cuda") else torch.float32)
    with fused.asking(Request(probe=probe)), torch.enable_grad():
        seen = logits_of(model(input_ids=ids[:, :1], **accepted(model, {"use_cache": False})))
    if seen.requires_grad:
        raise HeadError(f"{name} has parameters behind its output head, which would not be trained")
    seen = seen.detach()
    if seen.shape[-1] != len(probe):
        raise HeadError(f"the model turns {len(probe)} numbers from its head into logits of {tuple(seen.shape)}")
    made = seen.double().reshape(-1, len(probe))[0].cpu()
    probe = probe.double()
    scale = _rounded((made[0] / probe[0]).item())
    largest = made[-2].item()
    capped = abs(largest) < 0.5 * abs(scale) * probe[-2].item()
    found = Transform(logit_scale=scale, softcap=_rounded(abs(largest)) if capped else None)
    expected = reference.logits(
        probe[:, None], torch.ones(1, 1, dtype=torch.float64), logit_scale=scale, softcap=found.softcap
    ).squeeze(1)
    if not torch.allclose(made, expected, rtol=1e-3, atol=1e-9):
        raise HeadError(
            f"{name} does something to its logits that is neither a scale nor a softcap: it makes "
            f"{[f'{x:.4g}' for x in made.tolist()]} of {list(PROBE)}"
        )
    return found


def probe_ids(vocab_size: int, device: torch.device, count: int = TOKENS) -> Tensor:
    """(1, count) ordinary tokens: special ones stand at the beginning or the end of a vocabulary."""
    return (torch.arange(count, device=device) + vocab_size // 2).remainder(vocab_size).unsqueeze(0)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, whatever shape the output has.

    Raises:
        HeadError: it has none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    found = output if isinstance(output, Tensor) else found
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise HeadError(
            f"the model gives no logits of shape (batch, tokens, vocabulary); found {type(output).__name__}"
        )
    return found


def first_difference(policy: nn.Module, ref: nn.Module, inputs: dict[str, Any]) -> str:
    """The name of the first module whose outputs differ between two models on the same inputs; "" if none do."""
    outputs = []
    for model in (policy, ref):
        seen: list[tuple[str, Any]] = []

        def note(_: nn.Module, __: Any, output: Any, name: str, seen: list[tuple[str, Any]] = seen) -> None:
            seen.append((name, _first_tensor(output)))

        hooks = [
            module.register_forward_hook(functools.partial(note, name=name))
            for name, module in model.named_modules() if name
        ]  # fmt: skip
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        outputs.append(seen)
    for (name, a), (_, b) in zip(*outputs, strict=False):
        if a is not None and b is not None and not (a.shape == b.shape and torch.equal(a, b)):
            return name
    return ""


def _first_tensor(output: Any) -> Any:
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output.detach().clone() if isinstance(output, Tensor) else None


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _allowed(model: nn.Module, logits: Tensor) -> float:
    return max(ROUNDINGS * torch.finfo(_logits_dtype(model, logits)).eps * max(1.0, logits.abs().max().item()), 1e-3)


def _rounded(value: float) -> float:
    """To seven digits: what a model that computes in float32 can tell, and 1 is exactly 1."""
    return float(f"{value:.7g}")


def _logits_dtype(model: nn.Module, logits: Tensor) -> torch.dtype:
    """What the logits were rounded to; a wrapper may have cast them up since."""
    if torch.is_autocast_enabled(logits.device.type):
        return torch.get_autocast_dtype(logits.device.type)
    return max([logits.dtype, narrowest(model)], key=lambda dtype: torch.finfo(dtype).eps)


def narrowest(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16, torch.float32)}
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
