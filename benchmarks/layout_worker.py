"""One system of benchmarks.layouts in a process of its own, which waits before each step until it is told to go.

It is run as a file, with the package that is to be measured on PYTHONPATH, so it imports nothing of this folder. A line
"go" on standard input is a step, a line "end" ends it. Each line that it answers begins with MARK: its layout in words
once it is ready, after every step its seconds, loss and gradient norm, at the end the most bytes that it held. All else
goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MARK = "\x1e"
LAYOUTS = ("before", "padded", "bucketed", "packed", "shared", "mask")
IGNORE = -100
BETA = 0.1


class Line:
    """What the two processes say to each other. before: bytes that are not counted."""

    before = 0

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print

    def say(self, **said: Any) -> None:
        self.out.write(MARK + json.dumps(said) + "\n")

    def wait(self) -> None:
        said = sys.stdin.readline().strip()
        if said != "go":  # the end, or the other process is gone
            self.say(most=_resident("VmHWM") - self.before)
            os._exit(0 if said == "end" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=[*LAYOUTS, "plain", "trl"])
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--items", required=True, help="a file of torch.save: pairs as DPODataset has them")
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    options = parser.parse_args()
    line, items = Line(), torch.load(options.items)
    policy, reference = (_load(options.model) for _ in range(2))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that the loss says something of the pairs
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=noise), alpha=0.1 * float(p.std(correction=0)))
    line.before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident
    folder = str(Path(options.items).parent / options.system)
    usual = _usual(folder, options, len(items) // options.pairs)
    if options.system == "plain":
        _plain(line, policy, reference, items, options)
    elif options.system == "trl":
        _trl(line, policy, reference, items, usual)
    else:
        _ours(line, policy, reference, items, usual, options.system)


def _load(folder: str) -> Any:
    """With the buffers that its constructor makes, which code of its own does not always save."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    made = type(loaded)(loaded.config)
    made.load_state_dict(loaded.state_dict())
    for module in made.modules():  # as ours has it
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


def _usual(folder: str, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": options.pairs, "bf16": options.bf16,
        "gradient_checkpointing": options.gradient_checkpointing, "use_cpu": True, "beta": BETA, "learning_rate": 1e-6,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def _ours(line: Line, policy: Any, reference: Any, items: list[Any], usual: dict[str, Any], system: str) -> None:
    from dpo_kernels.training import DPOConfig, DPOTrainer

    name = "padded" if system in ("before", "mask") else system
    layout: dict[str, Any] = {"layout": name} if hasattr(DPOConfig, "layout") else {}
    trainer = DPOTrainer(policy, reference, DPOConfig(**usual, **layout), items)
    if system == "mask":
        from dpo_kernels.training.layouts import Layout

        trainer.set_layout(Layout("shared", "mask"))
    _run(line, trainer, trainer.layout.told if layout else "")


def _trl(line: Line, policy: Any, reference: Any, items: list[Any], usual: dict[str, Any]) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    # It wants texts to tokenize at the start; what it trains on are the same token ids as the others'.
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("pqabc")}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="p", eos_token="q")
    trainer = DPOTrainer(
        policy, reference, DPOConfig(**usual, max_length=None), train_dataset=texts, processing_class=tokenizer
    )
    trainer.args.remove_unused_columns = False
    trainer.train_dataset, trainer.data_collator = items, _whole_sequences
    _run(line, trainer)


def _whole_sequences(items: list[Any]) -> dict[str, torch.Tensor]:
    """(2B, S) each, chosen first, padded on the right: input_ids, attention_mask, completion_mask."""
    rows = [_whole(item, side) for side in ("chosen", "rejected") for item in items]
    length = max(len(ids) for ids, _ in rows)
    made = torch.zeros(3, len(rows), length, dtype=torch.long)
    for i, (ids, counts) in enumerate(rows):
        made[0, i, : len(ids)], made[1, i, : len(ids)], made[2, i, : len(ids)] = ids, 1, counts
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), made, strict=True))


def _whole(item: Any, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence up to its last token that counts, and which of its tokens count."""
    x, y, mask = (item[f"{name}_{side}"] for name in ("x", "y", "mask"))
    end = int(mask.nonzero().max()) + 1
    return torch.cat([x[:end], y[end - 1 : end]]), torch.cat([mask.new_zeros(1), mask[:end]])


def _run(line: Line, trainer: Any, told: str = "") -> None:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            line.wait()
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begun

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                line.say(seconds=self.seconds, loss=float(logs["loss"]), norm=float(logs["grad_norm"]))

    trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.add_callback(Turns())
    line.say(told=told)
    trainer.train()


def _plain(line: Line, policy: Any, reference: Any, items: list[Any], options: argparse.Namespace) -> None:
    """A loop of a page: padded rows with their mask, logits, log_softmax and gather."""
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    if options.gradient_checkpointing:
        policy.gradient_checkpointing_enable()

    def sums(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**given, use_cache=False).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (each * batch["completion_mask"][:, 1:]).sum(-1)

    line.say(told="")
    for batch in _batches(items, options.pairs):
        line.wait()
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            with torch.no_grad():
                of_reference = sums(reference, batch)
            chosen, rejected = (sums(policy, batch) - of_reference).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        line.say(seconds=time.perf_counter() - begun, loss=float(loss.detach()), norm=float(norm))


def _batches(items: list[Any], pairs: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(items) - pairs + 1, pairs):
        yield _whole_sequences(items[start : start + pairs])


def _resident(name: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM the most."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(name + ":"):
            return int(row.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    main()
