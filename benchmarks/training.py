"""The training step: train.py's DPOTrainer beside TRL's and beside transformers with logits, on one small model.

A step is `Trainer.training_step`: policy and reference forward, loss, backward. The optimizer's step, which is the same
for all, is left out. Policy and reference are random Qwen3 models that differ a little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.inputs import IGNORE, Outcome, Step
from benchmarks.verify import BETA, Problem, Truth
from dpo_kernels import reference

# Gradients that are verified, by the name that the table gives them.
CHECKED = {"lm_head": "lm_head.weight", "q_proj": "model.layers.0.self_attn.q_proj.weight"}


def make_model(case: Case, seed: int) -> Any:
    """A random Qwen3 model with an untied head; two seeds give models that differ by noise of a tenth."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = case.hidden_size
    config = Qwen3Config(
        vocab_size=case.vocab_size, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=2,
        num_attention_heads=size // 64, num_key_value_heads=max(1, size // 128), head_dim=64,
        max_position_embeddings=case.length + 1, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 * float(p.std(correction=0)))
    return model


def make_batch(case: Case) -> dict[str, Tensor]:
    """ids (R, S + 1) and labels (R, S), -100 in the prompt; the first half of the rows chosen, the second rejected."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, case.vocab_size, (case.sequences, case.length + 1), generator=generator)
    chosen, rejected = ids.chunk(2)
    rejected[:, : case.prompt] = chosen[:, : case.prompt]
    labels = ids[:, 1:].clone()
    labels[:, : case.prompt] = IGNORE
    return {"ids": ids, "labels": labels}


@dataclass
class Made:
    """A trainer's step, which returns the loss and leaves gradients, and the policy that it trains."""

    step: Callable[[], Tensor]
    policy: nn.Module

    def run(self) -> Outcome:
        self.policy.zero_grad()
        loss = self.step()
        grads = {name: self.policy.get_parameter(path).grad for name, path in CHECKED.items()}
        return {"loss": loss.detach()} | {name: g for name, g in grads.items() if g is not None}

    def change(self) -> None:
        """Another policy: logits of half the size."""
        with torch.no_grad():
            self.policy.get_parameter(CHECKED["lm_head"]).mul_(0.5)


def with_logits(case: Case, device: torch.device, folder: str = "", dtype: torch.dtype = torch.float32) -> Made:
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

    return Made(step, policy)


def ours(case: Case, device: torch.device, folder: str) -> Made:
    from dpo_kernels.training import DPOConfig, DPOTrainer

    made = make_batch(case)
    both = {"x": made["ids"][:, :-1], "y": made["labels"], "mask": made["labels"] != IGNORE}
    batch = {
        f"{name}_{side}": t.chunk(2)[i] for name, t in both.items() for i, side in enumerate(("chosen", "rejected"))
    }
    items = [{name: t[i] for name, t in batch.items()} for i in range(case.sequences // 2)]
    trainer = DPOTrainer(make_model(case, 1), make_model(case, 2), DPOConfig(**options_of(device, folder)), items)
    return Made(partial(trainer.training_step, trainer.model, batch), trainer.model)


def trl(case: Case, device: torch.device, folder: str) -> Made:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    batch = make_batch(case)
    inputs = {
        "input_ids": batch["ids"],
        "attention_mask": torch.ones_like(batch["ids"]),
        "completion_mask": F.pad((batch["labels"] != IGNORE).long(), (1, 0)),
    }
    # The trainer wants texts to tokenize; the step is then given the same token ids as the others.
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("pqabc")}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="p", eos_token="q")
    options = options_of(device, folder) | {"beta": BETA, "bf16": False, "gradient_checkpointing": False}
    policy, frozen = make_model(case, 1), make_model(case, 2)
    config = DPOConfig(**options, max_length=None)
    trainer = DPOTrainer(policy, frozen, config, train_dataset=texts, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # which train() sets before its first step
    return Made(partial(trainer.training_step, trainer.model, inputs), trainer.model)


def trl_enabled(case: Case, device: torch.device, folder: str) -> Made:
    """TRL's trainer with this package's log-probs. Its loss is TRL's, and held to what TRL's is held to."""
    from dpo_kernels.integrations.trl import enable

    made = trl(case, device, folder)
    own = made.step

    def step() -> Tensor:
        with enable():
            return own()

    return Made(step, made.policy)


class TrainingProblem(Problem):
    """Trainers have models and batches of their own: what changes is every policy.

    The truth is transformers' answer in float64. There is no floor.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)  # gone with this
        self.made: dict[str, Made] = {}
        self.changed = False

    @cached_property
    def truth(self) -> Truth:
        both = [with_logits(self.case, self.device, dtype=dtype) for dtype in (torch.float64, self.case.torch_dtype)]
        for made in both if self.changed else ():
            made.change()
        exact, plain = (made.run() for made in both)
        return Truth.beside(exact, plain, self.case.torch_dtype, torch.empty(0, dtype=torch.bool), 0.0, 0.0)

    def step(self, peer: Any) -> Step:
        made = self.made[peer.name] = peer.adapters["train"](self.case, self.device, self.folder.name)
        return made.run

    def run(self, step: Step) -> Outcome:
        return step()

    def restore(self) -> bool:
        return False

    def change(self) -> None:
        self.changed = True
        self.forget()
        for made in self.made.values():
            made.change()

    def clear(self) -> None:
        for made in self.made.values():
            made.policy.zero_grad()


def options_of(device: torch.device, folder: str) -> dict[str, Any]:
    cpu = device.type == "cpu"
    return {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "use_cpu": cpu, "save_strategy": "no"}
