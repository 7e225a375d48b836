"""How long a pair may be under a limit: ours, TRL's trainer and a plain loop on one small Qwen3, a step of each length.

python -m benchmarks.long_context                       docs/long_context.json and docs/long_context.png; about an hour
python -m benchmarks.long_context --tokens 2048 4096    lengths of a prompt with its answer
python -m benchmarks.long_context --only "ours, --fit"  some of them; rows that the file has of others stay
python -m benchmarks.long_context --draw-only           table and picture anew, from the file

A step has its reference and its optimizer, and one pair of two answers of equal length: eight layers of 512 features,
a vocabulary of 151,936, full fine-tuning with a second model, products in bfloat16. It is the second of its run: before
it comes one of a short pair, after which the optimizer holds what it will hold. Each is a process of its own, which may
hold 16 GiB (RLIMIT_DATA) and reports the most that was resident and the seconds of the second step. Who passes the
limit is not asked for longer pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.run_memory import fake_run, most_resident
from dpo_kernels.training.memory.out_of_memory import WORDS

ROOT = Path(__file__).parents[1]
TOKENS = (2048, 4096, 8192, 16_384, 32_768)
GIB = 2**30
LIMIT, BUDGET = 16 * GIB, 6 * GIB
SHORT = (32, 32, 32)  # tokens of prompt and answers of the first step's pair
BETA = 0.1
QWEN3: dict[str, Any] = {"vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 40_960,
         "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
COLORS = {"plain": "#7f7f7f", "ours": "#0072B2", "ours, --fit": "#D55E00", "TRL": "#009E73"}  # Okabe and Ito's


@dataclass(frozen=True)
class Row:
    """tokens: of a prompt with its answer. bytes: the most that was resident; None: more than the limit. seconds: of a
    step. chosen: what --fit chose. planned: bytes, by the plan. lowered: with what the step was run again, where memory
    did not suffice for it (by then it held the limit)."""

    system: str
    tokens: int
    bytes: int | None
    seconds: float | None = None
    chosen: str = ""
    planned: int | None = None
    lowered: str = ""


@dataclass(frozen=True)
class Made:
    """What trains two steps and returns the seconds of the second. chosen, planned, lowered: as of `Row`."""

    train: Callable[[], float]
    chosen: str = ""
    planned: int | None = None
    lowered: Callable[[], str] = lambda: ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a length and the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/long_context.json", help="the picture is beside it")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--only", nargs="+", default=[*SYSTEMS], choices=[*SYSTEMS])
    parser.add_argument("--draw-only", action="store_true")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside is not None:
        print(json.dumps(asdict(_inside(options.inside[0], int(options.inside[1])))))
        return 0
    rows = _load(options.output)
    if not options.draw_only:
        wanted = {(name, tokens) for name in options.only for tokens in options.tokens}
        rows = [row for row in rows if (row.system, row.tokens) not in wanted]
        passed: set[str] = set()
        for tokens in sorted(options.tokens):
            for name in options.only:
                if name in passed:
                    continue
                row = measured(name, tokens)
                if row.bytes is None:
                    passed.add(name)
                rows.append(row)
                print(_line(row), flush=True)
                _save(rows, options.output)
    draw(rows, options.output.with_suffix(".png"))
    print(table(rows))
    return 0


def measured(name: str, tokens: int) -> Row:
    """A step in a process of its own.

    Raises:
        RuntimeError: it failed, and not for want of memory; says how.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.long_context", "--inside", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    if any(word in done.stderr.lower() for word in (*WORDS, "memoryerror", "could not create a memory")):
        return Row(name, tokens, None)
    last = "\n".join(done.stderr.strip().splitlines()[-5:])
    raise RuntimeError(f"{name} at {tokens:,} tokens ended with status {done.returncode}: {last}")


def _inside(name: str, tokens: int) -> Row:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    torch.manual_seed(0)
    prompt = min(256, tokens // 8)
    with tempfile.TemporaryDirectory() as folder:
        made = SYSTEMS[name](prompt, tokens - prompt, folder)
        seconds = made.train()
    return Row(name, tokens, most_resident(), seconds, made.chosen, made.planned, made.lowered())


def _models() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    policy, reference = (Qwen3ForCausalLM(Qwen3Config(**QWEN3)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    return policy, reference


def _ours(prompt: int, answer: int, folder: str, budget: int | None = None) -> Made:
    from transformers import Qwen3Config

    from dpo_kernels.commands import run_plan
    from dpo_kernels.training import DPOConfig, DPOTrainer
    from dpo_kernels.training.memory.device_memory import keep_compact
    from dpo_kernels.training.memory.lower import fit
    from dpo_kernels.training.memory.pairs import made_pairs
    from dpo_kernels.training.memory.step_memory import StepOptions

    args = DPOConfig(**_usual(folder))
    pairs = made_pairs(prompt, answer, answer)
    chosen, planned = "", None
    if budget is not None:
        run = fake_run(Qwen3Config(**QWEN3), args, (prompt, answer, answer), torch.float32)
        found = fit(run, pairs, StepOptions.of(args), budget)
        chosen, planned = " ".join(one.option for one, _ in found.steps), found.memory.bytes
        run_plan.take(found, args, run)
        if planned > run_plan.SHORT * budget:
            keep_compact()  # as train.py does
        del run
    items = [{key: tensor[0] for key, tensor in each.items()} for each in (made_pairs(*SHORT), pairs)]
    policy, reference = _models()
    trainer = DPOTrainer(policy, reference, args, items)
    return Made(partial(_train, trainer), chosen, planned, partial(_lowered, trainer))


def _trl(prompt: int, answer: int, folder: str) -> Made:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("pqabc")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="p", eos_token="q")
    # The trainer adds the token that ends an answer.
    rows = Dataset.from_list([
        {"prompt": "a " * of_prompt, "chosen": " b" * (chosen - 1), "rejected": " c" * (rejected - 1)}
        for of_prompt, chosen, rejected in (SHORT, (prompt, answer, answer))
    ])  # fmt: skip
    policy, reference = _models()
    config = DPOConfig(**_usual(folder), max_length=None)
    trainer = DPOTrainer(policy, reference, config, train_dataset=rows, processing_class=tokenizer)
    return Made(partial(_train, trainer))


def _plain(prompt: int, answer: int, folder: str) -> Made:
    policy, reference = _models()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def sums(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
        each = logits.float().log_softmax(-1).gather(-1, ids[:, prompt:, None])
        return each.squeeze(-1).sum(-1)

    def step(prompt: int, answer: int) -> None:
        ids = torch.ones(2, prompt + answer, dtype=torch.long)
        ids[0, prompt:], ids[1, prompt:] = 2, 3
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                before = sums(reference, ids, prompt)
            margins = sums(policy, ids, prompt) - before
        loss = -torch.nn.functional.logsigmoid(BETA * (margins[0] - margins[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def train() -> float:
        step(*SHORT[:2])
        begin = time.perf_counter()
        step(prompt, answer)
        return time.perf_counter() - begin

    return Made(train)


def _lowered(trainer: Any) -> str:
    return ", ".join(entry["lowered"] for entry in trainer.state.log_history if "lowered" in entry)


def _train(trainer: Any) -> float:
    """Two steps; the seconds of the second."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    assert len(times) == 4, times
    return times[3] - times[2]


SYSTEMS: dict[str, Callable[[int, int, str], Made]] = {
    "plain": _plain, "TRL": _trl, "ours": _ours, "ours, --fit": partial(_ours, budget=BUDGET),
}  # fmt: skip


def _usual(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": 1, "bf16": True, "use_cpu": True,
        "train_sampling_strategy": "sequential", "beta": BETA, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row a length, memory and seconds of each."""
    names = [name for name in SYSTEMS if any(row.system == name for row in rows)]
    head = " | ".join(["tokens of each sequence", *names, "what --fit chose"])
    lines = [f"| {head} |", "|---:" * (len(names) + 1) + "|---|"]
    for tokens in sorted({row.tokens for row in rows}):
        found = {row.system: row for row in rows if row.tokens == tokens}
        cells = [_cell(found.get(name)) for name in names]
        chose = found.get("ours, --fit")
        said = "" if chose is None else f"`{chose.chosen}`" if chose.chosen else "nothing"
        lines.append(f"| 2 x {tokens:,} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.bytes is None or row.seconds is None:
        return f"> {LIMIT // GIB} GiB"
    again = f", run again with `{row.lowered}`" if row.lowered else ""
    return f"{row.bytes / 2**20:,.0f} MiB, {row.seconds:,.0f} s{again}"


def _line(row: Row) -> str:
    planned = f", planned {row.planned / 2**20:,.0f} MiB" if row.planned else ""
    return f"{row.system:<12} 2 x {row.tokens:>6,}  {_cell(row)}{planned}  {row.chosen}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Memory and seconds against tokens; a cross where a process passed the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in SYSTEMS:
        own = sorted((row for row in rows if row.system == name), key=lambda row: row.tokens)
        done = [row for row in own if row.bytes is not None]
        style: dict[str, Any] = {"color": COLORS[name], "marker": "o", "label": name}
        memory.plot([row.tokens for row in done], [row.bytes / GIB for row in done if row.bytes], **style)
        seconds.plot([row.tokens for row in done], [row.seconds for row in done], **style)
        for row in own:
            if row.bytes is None:
                memory.plot([row.tokens], [LIMIT / GIB], color=COLORS[name], marker="x", markersize=10)
    for bound, said in ((LIMIT, "limit"), (BUDGET, "budget of --fit")):
        memory.axhline(bound / GIB, color="black", linestyle="--", linewidth=0.8)
        memory.annotate(f"{bound // GIB} GiB, {said}", (TOKENS[3], bound / GIB), xytext=(0, 3), ha="center",
                        textcoords="offset points", fontsize=8)  # fmt: skip
    for axes, label in ((memory, "GiB, the most that a process held"), (seconds, "seconds of a step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(TOKENS, [f"2 x {tokens // 1024}k" for tokens in TOKENS])
        axes.set_xlabel("tokens of a pair")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    memory.set_ylim(0, 1.1 * LIMIT / GIB)
    seconds.set_yscale("log")
    seconds.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _save(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _load(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
