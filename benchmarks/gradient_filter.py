"""What gradient_filter gains and costs as less and less is kept: time, share, dropped mass and error, side by side.

python -m benchmarks.gradient_filter                                  V = 32,000 and 151,936, shuffled and in order
python -m benchmarks.gradient_filter --vocab 32000 --dtype bfloat16
python -m benchmarks.gradient_filter --model MODEL --data pairs.jsonl   what a model makes of its answers' tokens

Rows are peaked over a vocabulary of Zipf's frequencies: a logit is the logarithm of an entry's frequency and a random
part, and the label's is higher. A table row is a filter; its time is a full step's, over the exact step's in turn.
Errors are of gradients against the exact ones, norm over norm; `rounding` is what bfloat16 inputs do to them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import TokenStats, token_stats
from dpo_kernels.kernels.configs import PRODUCTS, Arch, resolve
from dpo_kernels.splits import parts

FILTERS = (2**-30, 2**-24, 2**-20, 2**-16, 2**-14, 2**-12, 2**-10, 2**-8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peak", type=float, default=8.0, help="by how much a label's logit is higher")
    parser.add_argument("--spread", type=float, default=2.0, help="standard deviation of a logit's random part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a trained one, such as benchmarks.trained_model makes")
    parser.add_argument("--data", type=Path, help="preference pairs")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    if options.model is not None:
        if not (options.model / "config.json").is_file():
            parser.error(f"--model {options.model} is no model's folder (it has no config.json)")
        if options.data is None or not options.data.is_file():
            parser.error(f"--data is {options.data}; --model takes tokens of a file of preference pairs (JSON lines)")
    dtype = getattr(torch, options.dtype)

    def placed(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple((t.to(dtype) if t.is_floating_point() else t).to(options.device) for t in inputs)

    if options.model is not None:
        real = placed(of_model(options))
        print(f"\n{len(real[0]):,} x {real[0].shape[1]:,} x {len(real[1]):,}, {options.dtype}, {options.model.name}\n")
        print(f"mean log-prob {step(real, None)[0].log_probs.mean():.2f}")
        table(real, options.repeats)
        on_a_gpu(real)
        return
    for vocab in options.vocab:
        for order in ("in order", "shuffled"):
            inputs = zipf(options.tokens, options.features, vocab, options.peak, options.spread, order == "in order")
            print(f"\n{options.tokens:,} x {options.features:,} x {vocab:,}, {options.dtype}, {order}\n")
            table(placed(inputs), options.repeats)


def zipf(n: int, d: int, v: int, peak: float, spread: float, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, d), weight (v, d), labels (n,)."""
    made = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, v + 1)
    if not in_order:
        frequency = frequency[torch.randperm(v, generator=made)]
    weight = torch.randn(v, d, generator=made) / d**0.5
    labels = torch.multinomial(frequency, n, replacement=True, generator=made)
    hidden = spread * torch.randn(n, d, generator=made) + peak * weight[labels]
    weight[:, 0], hidden[:, 0] = frequency.log(), 1.0
    return hidden, weight, labels


def of_model(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, d), weight (v, d), labels (n,): of answers, chosen and rejected in turn, until there are --tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.trained_model import START, text_of

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    hidden, labels = [], []
    lines = [json.loads(line) for line in options.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    for messages in (line[side] for line in lines for side in ("chosen", "rejected")):
        prompt = len(tokenizer(text_of({"messages": messages[:-1]}) + f"{START}assistant\n")["input_ids"])
        ids = torch.tensor(tokenizer(text_of({"messages": messages}))["input_ids"])
        with torch.no_grad():
            states = model.model(input_ids=ids[None]).last_hidden_state[0]
        hidden.append(states[prompt - 1 : -1])
        labels.append(ids[prompt:])
        if sum(map(len, labels)) >= options.tokens:
            break
    weight = model.get_output_embeddings().weight.detach()
    return torch.cat(hidden)[: options.tokens], weight, torch.cat(labels)[: options.tokens]


def on_a_gpu(inputs: tuple[Tensor, ...]) -> None:
    """What backward multiplies on a Hopper, without one: of columns those that pass for any of a group's tokens, and of
    blocks of the sorted columns those that the weight's gradient multiplies; then those that forward marks without room
    for exponentials, when it knows no more than what it has met. Products of a step both ways, of which an exact one
    has 3 and 4. Beside them, blocks that have an entry that passes, in the order of how many of these very tokens one
    passes for: 2 products and 2 of those, Cut Cross-Entropy's way."""
    hidden, weight, labels = (t.float() if t.is_floating_point() else t for t in inputs)
    z = (hidden @ weight.T).log_softmax(1)
    print("\n| filter | entries | columns of 128 | sorted blocks | products | marked | sorted | products | blocks | |")
    print("|---" + "|---:" * 9 + "|")
    for share in FILTERS:
        passes = (z >= log(share)).scatter(1, labels[:, None], True)
        cells = [f"{passes.float().mean():.1%}"]
        for again, each in ((1, passes), (2, _marked(z, labels, share, hidden.shape[1]))):
            of_groups = torch.stack([rows.any(0) for rows in each.split(128)])
            columns, blocks = (float(t.float().mean()) for t in (of_groups, _by_block(_sorted(of_groups))))
            cells += f"{columns:.1%}", f"{blocks:.1%}", f"{1 + again * columns + blocks:.2f}"
        by_frequency = torch.stack([rows.any(0) for rows in passes.split(128)])[
            :, passes.sum(0).argsort(descending=True)
        ]
        blocks = float(_by_block(by_frequency).float().mean())
        print(f"| {share:.1e} | {' | '.join(cells)} | {blocks:.1%} | {2 + 2 * blocks:.2f} |")


def _marked(log_probs: Tensor, labels: Tensor, share: float, features: int) -> Tensor:
    """As mark_columns of kernels/fused.py: what programs know of a row is its label, the parts before, and what they
    have walked themselves."""
    (n, v), block = log_probs.shape, 256
    splits = resolve(Arch("cuda", 9), features, torch.bfloat16, False).splits(PRODUCTS[Arch("cuda", 9), 2, "plain"])
    width = splits.width(n, v, 8192)
    known, found = log_probs.gather(1, labels[:, None])[:, 0], []
    others = log_probs.scatter(1, labels[:, None], -torch.inf)
    for start, end in parts(v, splits.first_part(n, v, width)):
        so_far = known
        for column in range(start, end, block):
            so_far = known if (column - start) % width == 0 else so_far
            of_block = others[:, column : min(column + block, end)]
            so_far = torch.logaddexp(so_far, of_block.logsumexp(1))
            found.append(of_block >= so_far[:, None] + log(share))
        known = torch.logaddexp(known, others[:, start:end].logsumexp(1))
    return torch.cat(found, 1).scatter(1, labels[:, None], True)


def _sorted(of_groups: Tensor) -> Tensor:
    """By key_kernel of kernels/columns.py, as if all were one tile."""
    count = of_groups.sum(0)
    keys = (count.clamp(min=1).log2().floor() + 1) * 65536 - of_groups.int().argmax(0)
    return of_groups[:, torch.where(count > 0, keys, 0.0).argsort(descending=True)]


def _by_block(of_groups: Tensor) -> Tensor:
    """(groups, blocks of 128 columns): which have any."""
    return torch.stack([block.any(1) for block in of_groups.split(128, 1)], 1)


def table(inputs: tuple[Tensor, ...], repeats: int) -> None:
    hidden, weight, labels = inputs
    exact = step(inputs, None)
    wide = step(tuple(t.float() if t.is_floating_point() else t for t in inputs), None)
    rounded = step((hidden.bfloat16(), weight.bfloat16(), labels), None)
    print(f"rounding: d hidden {_off(rounded[1], wide[1]):.1e}, d W {_off(rounded[2], wide[2]):.1e}\n")
    print("| filter | kept | dropped mass, mean | most | d hidden off by | d W off by | of the exact step |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for share in FILTERS:
        stats, of_hidden, of_weight = step(inputs, share)
        ratio = in_turn(partial(step, inputs, share), partial(step, inputs, None), repeats)
        dropped = stats.dropped_mass
        assert dropped is not None
        print(
            f"| {share:.1e} | {kept(inputs, share):.1%} | {dropped.mean():.1e} | {dropped.max():.1e} | "
            f"{_off(of_hidden, exact[1]):.1e} | {_off(of_weight, exact[2]):.1e} | {ratio:.2f} |", flush=True
        )  # fmt: skip
    peers = {"plain PyTorch": plain}
    if importlib.util.find_spec("cut_cross_entropy"):
        peers["CCE torch_compile"] = cce
    for name, peer in peers.items():
        ratio = in_turn(partial(peer, inputs), partial(step, inputs, None), repeats)
        print(f"| {name} | | | | | | {ratio:.2f} |", flush=True)


def step(inputs: tuple[Tensor, ...], share: float | None) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics and gradients of hidden states and weight."""
    hidden, weight = (t.detach().requires_grad_() for t in inputs[:2])
    stats = token_stats(hidden, weight, inputs[2], outputs=("dropped_mass",), gradient_filter=share)
    stats.log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return stats, hidden.grad, weight.grad


def plain(inputs: tuple[Tensor, ...]) -> None:
    hidden, weight = (t.detach().requires_grad_() for t in inputs[:2])
    F.cross_entropy((hidden @ weight.T).float(), inputs[2], reduction="sum").backward()


def cce(inputs: tuple[Tensor, ...]) -> None:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = (t.detach().requires_grad_() for t in inputs[:2])
    linear_cross_entropy(hidden, weight, inputs[2], impl="torch_compile", reduction="sum").backward()


def kept(inputs: tuple[Tensor, ...], share: float) -> float:
    """Of all entries, those that are in the gradients: by the op's own table."""
    from dpo_kernels.gathering import Marker
    from dpo_kernels.sparse import Keeper

    found = [1.0]
    finish, of_flags = Keeper.finish, Marker.finish

    def counted_flags(self: Marker, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        made = of_flags(self, maximum, log_sum)
        found.append(float(self.marks.flags[:, : self.plan.vocab_size].float().mean()))
        return made

    def counted(self: Keeper, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        whole = sum((p.rows.stop - p.rows.start) * p.entries for p in self.pieces if p.columns is None)
        found.append((whole + self.front) / (self.plan.tokens * self.plan.vocab_size))
        return finish(self, maximum, log_sum)

    Keeper.finish, Marker.finish = counted, counted_flags  # type: ignore[method-assign]
    try:
        step(inputs, share)
    finally:
        Keeper.finish, Marker.finish = finish, of_flags  # type: ignore[method-assign]
    return found[-1]


def in_turn(one: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Time of one over that of the other: the median over turns."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for call in (one, other):
            begun = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        ratios.append(times[0] / times[1])
    return median(ratios[1:])


def _off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


if __name__ == "__main__":
    main()
