"""The training step: train.py's DPOTrainer beside TRL's and beside transformers with logits, on one small model.

A step is `Trainer.training_step`: policy and reference forward, loss, backward. The optimizer's step, which is the same
for all, is left out. Policy and reference are random Qwen3 models that differ a little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import IGNORE, Case
from benchmarks.measure import Judge, Outcome, Row, clear, fill_bytes, fill_times, verify
from benchmarks.peak_memory import peak_bytes
from benchmarks.peers import BETA, import_failure
from dpo_kernels import reference

Batch = dict[str, Tensor]
# Gradients that are verified, by the name that the table gives them.
CHECKED = {"weight": "lm_head.weight", "hidden": "model.layers.0.self_attn.q_proj.weight"}


def make_model(case: Case, seed: int) -> Any:
    """A random Qwen3 model with an untied head; two seeds give models that differ by noise of a tenth."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = case.hidden_size
    config = Qwen3Config(
        vocab_size=case.vocab_size, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=2,
        num_attention_heads=size // 64, num_key_value_heads=max(1, size // 128), head_dim=64,
        max_position_embeddings=case.length + 1, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 * float(p.std(correction=0)))
    return model


def make_batch(case: Case) -> Batch:
    """ids (R, S + 1) and labels (R, S), -100 in the prompt; the first half of the rows chosen, the second rejected."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, case.vocab_size, (case.sequences, case.length + 1), generator=generator)
    prompt = round(case.masked * case.length)
    half = case.sequences // 2
    ids[half:, :prompt] = ids[:half, :prompt]
    labels = ids[:, 1:].clone()
    labels[:, :prompt] = IGNORE
    return {"ids": ids, "labels": labels}


def outcome(loss: Tensor, model: nn.Module) -> Outcome:
    parameters = dict(model.named_parameters())
    grads = {name: parameters[path].grad for name, path in CHECKED.items()}
    return {"loss": loss.detach()} | {name: g.detach().clone() for name, g in grads.items() if g is not None}


# Each maker takes a case and a device, builds models and trainer, and returns a step and the policy.
Made = tuple[Callable[[], Tensor], nn.Module]


def with_logits(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Made:
    """transformers' model with all logits, log_softmax and gather, and DPO's loss; in float64 the exact answer."""
    policy, frozen = (make_model(case, seed).to(device, dtype) for seed in (1, 2))
    batch = {name: t.to(device) for name, t in make_batch(case).items()}

    def log_probs(model: nn.Module) -> Tensor:
        logits = model(input_ids=batch["ids"][:, :-1], use_cache=False).logits
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        return torch.log_softmax(wide, -1).gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)

    def step() -> Tensor:
        with torch.no_grad():
            of_reference = log_probs(frozen)
        loss = reference.dpo_loss(of_reference, log_probs(policy), batch["labels"] != IGNORE, BETA)[0]
        loss.backward()
        return loss

    return step, policy


def ours(case: Case, device: torch.device) -> Made:
    from dpo_kernels.training import DPOConfig, DPOTrainer

    made = make_batch(case)
    mask = made["labels"] != IGNORE
    both = {"x": made["ids"][:, :-1], "y": made["labels"], "mask": mask}
    batch = {
        f"{name}_{side}": part
        for name, t in both.items()
        for side, part in zip(("chosen", "rejected"), t.chunk(2), strict=True)
    }
    items = [{name: t[i] for name, t in batch.items()} for i in range(case.sequences // 2)]
    trainer = DPOTrainer(make_model(case, 1), make_model(case, 2), DPOConfig(**_options(device)), items)
    return partial(trainer.training_step, trainer.model, batch), trainer.model


def trl(case: Case, device: torch.device) -> Made:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    batch = make_batch(case)
    inputs = {
        "input_ids": batch["ids"],
        "attention_mask": torch.ones_like(batch["ids"]),
        "completion_mask": F.pad((batch["labels"] != IGNORE).long(), (1, 0)),
    }
    # The trainer wants texts to tokenize; the step is then given the same token ids as the others.
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    config = DPOConfig(**_options(device), beta=BETA, bf16=False, gradient_checkpointing=False, max_length=None)
    trainer = DPOTrainer(
        make_model(case, 1), make_model(case, 2), config, train_dataset=texts, processing_class=_tokenizer()
    )
    trainer.current_gradient_accumulation_steps = 1  # which train() sets before its first step
    return partial(trainer.training_step, trainer.model, inputs), trainer.model


TRAINERS: dict[str, Callable[[Case, torch.device], Made]] = {
    "dpo_kernels DPOTrainer": ours,
    "transformers with logits": with_logits,
    "TRL DPOTrainer": trl,
}
MODULES = {
    "dpo_kernels DPOTrainer": "dpo_kernels.training",
    "transformers with logits": "transformers",
    "TRL DPOTrainer": "trl",
}


def measure_training(case: Case, device: torch.device, seconds: float) -> list[Row]:
    """A row for each trainer, verified against transformers in float64; ratios are to ours, there is no floor."""
    exact, plain = (_verified_step(*with_logits(case, device, dtype)) for dtype in (torch.float64, case.torch_dtype))
    judge = Judge.beside(exact, plain, case.torch_dtype, torch.empty(0, dtype=torch.bool))
    rows: list[Row] = []
    runs: dict[str, Callable[[], object]] = {}
    for name, make in TRAINERS.items():
        row = Row(asdict(case), name, "unavailable", reason=import_failure(MODULES[name]) or "")
        rows.append(row)
        made: list[Made] = []

        def run(make: Callable[..., Made] = make, made: list[Made] = made) -> Outcome:
            made.append(make(case, device))
            return _verified_step(*made[0])

        if verify(row, run, judge):
            runs[name] = partial(_timed_step, *made[0])
    fill_times(rows, runs, seconds, device)
    if case.memory:
        fill_bytes(rows, seconds, device, lambda row: peak_bytes(device, prepare, case, row.peer))
    return rows


def prepare(device: torch.device, case: Case, name: str) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """As `measure.prepare`, for a trainer."""
    step, model = TRAINERS[name](case, device)
    return step, lambda: clear(model.parameters())


def _verified_step(step: Callable[[], Tensor], model: nn.Module) -> Outcome:
    clear(model.parameters())
    return outcome(step(), model)


def _timed_step(step: Callable[[], Tensor], model: nn.Module) -> None:
    clear(model.parameters())
    step()


def _options(device: torch.device) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"), "report_to": "none", "disable_tqdm": True,
        "use_cpu": device.type == "cpu", "save_strategy": "no",
    }  # fmt: skip


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "a", "b", "c"))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), pad_token="<pad>", eos_token="</s>"
    )
