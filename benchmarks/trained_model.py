"""A small model that was really trained, from text at hand: what random weights cannot show is how sure a model is.

python -m benchmarks.trained_model --data texts.jsonl --out MODEL --minutes 90
python -m benchmarks.trained_model --data pairs.jsonl --out MODEL --model MODEL --minutes 5   its chosen answers next

A line of the data is {"text": ...}, {"messages": [...]}, or a preference pair, whose chosen conversation is taken. The
tokenizer (byte-level BPE) is trained on it too, unless a model is given. Every token is learned, in rows of --length;
the learning rate rises, then falls to 0 by the clock. The folder is a transformers model that train.py takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import hidden_to_log_probs

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for m in messages %}" + START + "{{ m['role'] }}\n{{ m['content'] }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
SAVE_EVERY = 600.0  # seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="go on from this one")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    texts = [text_of(json.loads(line)) for line in options.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    tokenizer, model = made(texts, options) if options.model is None else loaded(options.model)
    held_out = max(1, len(texts) // 100)
    stream = {"train": tokens_of(texts[held_out:], tokenizer), "held out": tokens_of(texts[:held_out], tokenizer)}
    print(", ".join(f"{name}: {len(t):,} tokens" for name, t in stream.items()), flush=True)
    train(model, stream, options, save=lambda: save(model, tokenizer, options.out))


def text_of(line: dict[str, Any]) -> str:
    """With the marks that the chat template writes."""
    if "text" in line:
        return str(line["text"]) + PAD
    messages = line["messages"] if "messages" in line else line["chosen"]
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def made(texts: list[str], options: argparse.Namespace) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=options.vocab, special_tokens=[PAD, START, END], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHATML
    size = options.hidden
    config = Qwen3Config(
        vocab_size=options.vocab, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=options.layers,
        num_attention_heads=size // 64, num_key_value_heads=max(1, size // 128), head_dim=64,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return tokenizer, Qwen3ForCausalLM(config)


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokens_of(texts: list[str], tokenizer: Any) -> Tensor:
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for text in found for token in text])


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean negative log-prob of rows (R, S + 1) of tokens."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    return -hidden_to_log_probs(hidden, model.get_output_embeddings().weight, ids[:, 1:]).mean()


def batches(stream: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """Rows of `length` + 1 tokens in a random order, each once an epoch; each epoch is cut at another place."""
    size = options.length + 1
    if len(stream) < 2 * size:
        raise ValueError(
            f"{len(stream):,} tokens are less than two rows of {size:,}; give more text or a smaller --length"
        )
    for epoch in range(1_000_000):
        shift = epoch * 97 % size
        rows = stream[shift : shift + (len(stream) - shift) // size * size].view(-1, size)
        yield from rows[torch.randperm(len(rows))].split(options.rows)


def train(model: Any, stream: dict[str, Tensor], options: argparse.Namespace, save: Any) -> None:
    held_out = next(batches(stream["held out"], argparse.Namespace(length=options.length, rows=32)))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    begun = saved = told = time.perf_counter()
    total, counted, tokens = 0.0, 0, 0
    for step, ids in enumerate(batches(stream["train"], options)):
        now = time.perf_counter()
        part = (now - begun) / (60 * options.minutes)
        if part >= 1:
            break
        rate = options.learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total, counted, tokens = total + float(loss), counted + 1, tokens + ids[:, 1:].numel()
        if now - told > 30:
            print(f"{(now - begun) / 60:5.1f} min, {tokens:,} tokens: loss {total / counted:.3f}", flush=True)
            told, total, counted = now, 0.0, 0
        if now - saved > SAVE_EVERY:
            save()
            saved = now
    with torch.no_grad():
        print(f"{tokens:,} tokens learned, loss of what was held out {float(loss_of(model, held_out)):.3f}", flush=True)
    save()


def save(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
