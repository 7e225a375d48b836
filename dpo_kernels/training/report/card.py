"""README.md of a trained model, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dpo_kernels import __version__
from dpo_kernels.training.data import write_whole
from dpo_kernels.training.report.metrics import MEANINGS, NAMES, Log, figure, held_out, points
from dpo_kernels.training.report.page import environment
from dpo_kernels.training.report.sentences import Finding
from dpo_kernels.training.sources import READERS

CARD_NAME = "README.md"
CARD_BESIDE = "model_card.md"  # where README.md is somebody's own
MARK = "dpo_kernels"  # the tag by which a card of ours is known
SHOWN = ("loss", "logps/accuracies", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
         "logps/chosen", "logps/rejected")  # fmt: skip
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")

WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder{code})
"""
ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = {folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder{code})  # the base model with this adapter
"""
CHAT = """\
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
PLAIN = """\
inputs = tokenizer({question}, return_tensors="pt")
"""
ANSWER = """\
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run.

    folder: as a reader shall give it to load the model. base: name of what the policy started from; "" where it was
    made on the spot. data: names. rows: what the run said at its start. question: for the snippet; has_chat: as a
    message. has_own_code: the model brings code that has to be allowed.
    """

    title: str
    folder: str
    base: str
    data: Sequence[str]
    rows: Sequence[tuple[str, str]]
    loss: str
    question: str
    has_chat: bool
    is_adapter: bool = False
    has_own_code: bool = False


def card_name(output_dir: Path) -> str:
    """README.md; model_card.md where there is a README.md that is none of ours.

    Raises:
        OSError: the one that is there cannot be read.
    """
    path = output_dir / CARD_NAME
    return CARD_NAME if not path.exists() or _is_ours(path) else CARD_BESIDE


def write_card(facts: CardFacts, log: Log, findings: Sequence[Finding], path: Path) -> Path:
    """Writes the card, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, card(facts, log, findings))
    return path


def card(facts: CardFacts, log: Log, findings: Sequence[Finding]) -> str:
    base = facts.base if on_the_hub(facts.base) else None
    hub_data = [name.split(":")[0] for name in facts.data]
    front = ModelCardData(
        base_model=base, base_model_relation=("adapter" if facts.is_adapter else "finetune") if base else None,
        datasets=[name for name in hub_data if on_the_hub(name)] or None, tags=["dpo", MARK, "preference-alignment"],
        library_name="peft" if facts.is_adapter else "transformers", pipeline_tag="text-generation",
        model_name=facts.title,
    )  # fmt: skip
    what = "An adapter for" if facts.is_adapter else "A fine-tuned"
    said = f"{what} `{facts.base}`." if facts.base else "A small model that was made and taught for an example."
    env = environment()
    env.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return env.get_template("card.md.j2").render(
        front_matter=f"---\n{front.to_yaml()}\n---", title=facts.title, what=said, loss=facts.loss,
        snippet=snippet(facts), data=", ".join(f"`{name}`" for name in facts.data),
        settings=[row for row in facts.rows if row[0] != "data"], results=_results(log), meanings=MEANINGS,
        findings=findings, versions=versions(),
    )  # fmt: skip


def snippet(facts: CardFacts) -> str:
    """Python that loads the model and asks it something."""
    load = ADAPTER if facts.is_adapter else WHOLE
    ask = CHAT if facts.has_chat else PLAIN
    code = ", trust_remote_code=True" if facts.has_own_code else ""
    folder, question = (json.dumps(text, ensure_ascii=False) for text in (facts.folder, facts.question))
    return load.format(folder=folder, code=code) + ask.format(question=question) + ANSWER


def on_the_hub(name: str) -> bool:
    """Whether a name is one of the hub's, and of no folder or file, here or where the example lies."""
    path = Path(name)
    return bool(ON_THE_HUB.fullmatch(name)) and not READERS.keys() & {*path.suffixes} and not path.exists()


def versions() -> str:
    """Of what a run depends on, as far as it is installed."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft")
    installed = [f"{name} {metadata.version(name)}" for name in names if find_spec(name) is not None]
    return ", ".join([f"dpo_kernels {__version__}", *installed, f"Python {platform.python_version()}"])


def _is_ours(path: Path) -> bool:
    """Whether the front matter of a card has our tag."""
    before, *front = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    return not before and len(front) == 2 and f"- {MARK}" in map(str.strip, front[0].splitlines())


def _results(log: Log) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for key in SHOWN:
        sets: dict[str, Any] = {f"held out {name}".strip(): own for name, own in held_out(log, key).items()}
        for where, own in {"training": key, **sets}.items():
            if line := points(log, own):
                before, after = (figure(key, value) for _, value in (line[0], line[-1]))
                rows.append((f"{NAMES[key]}, {where}", before if len(line) > 1 else "", after))
    return rows
