"""A run from its start to its end, as it is told: what it keeps to tell, and what it writes beside its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dpo_kernels.training import adapters
from dpo_kernels.training.answers import LONGEST_PROMPT, answers_to, last_question, prompts_of
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import lengths
from dpo_kernels.training.loading import is_own_code, max_positions
from dpo_kernels.training.output_head import below_adapters
from dpo_kernels.training.processes import is_partitioned
from dpo_kernels.training.report.card import CARD_BESIDE, CARD_NAME, CardFacts, card_name, versions, write_card
from dpo_kernels.training.report.metrics import LOG_NAME, figure
from dpo_kernels.training.report.page import (
    REPORT_NAME,
    Answer,
    Page,
    drawn,
    tiles_of,
    write_page,
)
from dpo_kernels.training.report.pictures import CURVES_NAME
from dpo_kernels.training.report.sentences import Finding, Options, findings
from dpo_kernels.training.report.start import RunFacts
from dpo_kernels.training.report.svg import histogram_svg
from dpo_kernels.training.report.tokens import full_colour, reward_told, shown_pair
from dpo_kernels.training.scoring import ScoredPair, score_of, score_pairs
from dpo_kernels.training.trainer import DPOTrainer
from dpo_kernels.warn import warn

PROMPTS, PAIRS = 3, 6
Result = TypeVar("Result")


class FirstStep(TrainerCallback):
    """Keeps the step from which a training goes on; 0 of one that starts."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


class RunReport:
    """Of the main process: asks the policy before and after training, and writes report.html and README.md; a README.md
    that is somebody's own is left, and the card is model_card.md.

    Nothing here ends a run: what goes wrong is a warning, and the model is saved before.

    Args:
        trainer: ready to train.
        facts: what was said at the start.
        tokenizer: of the policy.
        with_samples: whether the policy is asked, and pairs are scored. Where parameters are sharded they are not: one
            process cannot ask alone.
    """

    def __init__(
        self, trainer: DPOTrainer, facts: RunFacts, tokenizer: PreTrainedTokenizerBase, with_samples: bool = True
    ) -> None:
        self.trainer, self.facts, self.tokenizer = trainer, facts, tokenizer
        sharded = trainer.is_fsdp_enabled or is_partitioned(trainer.accelerator)
        self.with_samples = with_samples and not sharded
        self.began = time.perf_counter()
        self.trained = 0.0  # seconds
        self.seconds = 0.0  # that asking and writing took, all together
        sets = trainer.eval_dataset
        first = next(iter(sets.values()), None) if isinstance(sets, dict) else sets
        self.held_out = bool(first)
        self.dataset: Any = first if first else trainer.train_dataset
        self.prompts: list[list[int]] = []
        self.before: list[str] = []
        self.after: list[str] = []
        self.scored: list[ScoredPair] = []
        self.first = FirstStep()
        trainer.add_callback(self.first)
        trainer.has_own_card = True
        self.card = self._tried(CARD_NAME, partial(card_name, Path(str(trainer.args.output_dir))), CARD_BESIDE)

    def ask_before(self) -> None:
        """Before the first step."""
        if self.with_samples and isinstance(self.dataset, DPODataset):
            positions = max_positions(getattr(self.trainer.model, "config", None))
            longest = LONGEST_PROMPT if positions is None else min(LONGEST_PROMPT, positions - 1)
            self.prompts = self._tried("the prompts", partial(prompts_of, self.dataset, PROMPTS, longest), [])
            self.before = self._tried("the answers before training", self._answers, [])
        self.began = time.perf_counter()

    def ask_after(self) -> None:
        """After the last step, as long as the policy and its reference are what they were in training."""
        self.trained = time.perf_counter() - self.began
        if not (self.with_samples and isinstance(self.dataset, DPODataset)):
            return
        if self.before:
            self.after = self._tried("the answers after training", self._answers, [])
        if self.trainer.args.loss_options.needs_reference:
            self.scored = self._tried("the pairs of the report", self._score, [])

    def write(self) -> tuple[list[Finding], list[str]]:
        """What happened, and the names of the files that were written; with push_to_hub they are uploaded too."""
        log = self.trainer.state.log_history
        found: list[Finding] = self._tried("what happened", lambda: findings(log, self._options()), [])
        output_dir = Path(str(self.trainer.args.output_dir))
        written = []
        for name, write in ((self.card, self._write_card), (REPORT_NAME, self._write_page)):
            if self._tried(name, partial(write, found, output_dir), None) is not None:
                written.append(name)
        if self.trainer.args.push_to_hub:
            self._tried("the upload of what was written", partial(self._upload, written, output_dir), None)
        return found, written

    def answers(self) -> list[Answer]:
        questions = [last_question(self.tokenizer, prompt) for prompt in self.prompts]
        return [Answer(*three) for three in zip(questions, self.before, self.after, strict=False)]

    def _answers(self) -> list[str]:
        with self.trainer.accelerator.autocast():
            return answers_to(self.trainer.model, self.tokenizer, self.prompts)

    def _score(self) -> list[ScoredPair]:
        trainer = self.trainer
        device, layout = trainer.args.device, trainer.layout

        def as_batch(inputs: dict[str, torch.Tensor]) -> PairBatch:
            return PairBatch({name: tensor.to(device) for name, tensor in inputs.items()}, layout)

        policy = score_of(trainer.model, trainer.accelerator)
        indices = range(min(PAIRS, len(self.dataset)))
        return list(
            score_pairs(self.dataset, indices, policy, trainer.reference.log_probs, batch_size=1, as_batch=as_batch)
        )  # fmt: skip  (one fits wherever a batch of training does)

    def _options(self) -> Options:
        args = self.trainer.args
        return Options(
            args.beta, args.learning_rate, args.loss_type, args.dpo_aggregate, args.loss_options.needs_reference,
            adapters.is_adapted(self.trainer.model),
            self.facts.starts_at_reference and not args.sync_ref_model and args.adapter_reference != "base",
        )  # fmt: skip

    def _write_card(self, found: list[Finding], output_dir: Path) -> Path:
        model, args = self.trainer.model, self.trainer.args
        question = last_question(self.tokenizer, self.prompts[0]) if self.prompts else "How are you?"
        facts = CardFacts(
            self.facts.title, args.hub_model_id or str(output_dir), self.facts.base,
            self.facts.data, self.facts.rows, " + ".join(args.loss_type), question, bool(self.tokenizer.chat_template),
            adapters.is_adapted(model), is_own_code(below_adapters(model)),
        )  # fmt: skip
        if self.card != CARD_NAME:
            warn(f"{output_dir / CARD_NAME} was not written by a run: it is left as it is, and the card is {self.card}")
        return write_card(facts, self.trainer.state.log_history, found, output_dir / self.card)

    def _upload(self, written: list[str], output_dir: Path) -> None:
        """What came behind the model, which is there already."""
        args = self.trainer.args
        HfApi(token=args.hub_token).upload_folder(
            repo_id=str(self.trainer.hub_model_id), folder_path=output_dir, revision=args.hub_revision,
            allow_patterns=[*written, LOG_NAME, CURVES_NAME], commit_message="Card and report",
        )  # fmt: skip

    def _write_page(self, found: list[Finding], output_dir: Path) -> Path:
        trainer, beta, aggregate = self.trainer, self.trainer.args.beta, self.trainer.args.dpo_aggregate
        full = full_colour(self.scored, beta)
        pairs = [shown_pair(pair, self.tokenizer, beta, full, aggregate) for pair in self.scored]
        rows = trainer.train_dataset.rows if isinstance(trainer.train_dataset, DPODataset) else None
        which = "held-out pairs" if self.held_out else "pairs that were trained on"
        state = trainer.state
        page = Page(
            title=self.facts.title, subtitle=steps_told(state.global_step, self.first.step, self.trained),
            tiles=tiles_of(state.log_history), findings=found, answers=self.answers(),
            where_from=f"To the first prompts of the {which}.", pairs=pairs,
            pairs_from=f"The first {len(pairs)} {which}.", full=f"±{figure('rewards/margins', full)}",
            reward_told=reward_told(self.scored, aggregate),
            panels=drawn(state.log_history, trainer.args.loss_type),
            lengths=Markup("") if rows is None else histogram_svg(lengths(rows), trainer.train_dataset.max_length),
            settings=self.facts.rows, versions=versions(),
        )  # fmt: skip
        return write_page(page, output_dir)

    def _tried(self, what: str, do: Callable[[], Result], otherwise: Result) -> Result:
        """What `do` gives; where it fails, `otherwise`, and a warning: a report is not worth a model."""
        began = time.perf_counter()
        try:
            return do()
        except Exception as error:
            told = f"{what} could not be made ({type(error).__name__}: {error}); the model is not touched by it"
            warn(told)
            return otherwise
        finally:
            self.seconds += time.perf_counter() - began


def steps_told(last: int, first: int, seconds: float) -> str:
    """All steps; of a run that was gone on with, how long those from its last start on took."""
    if not first:
        return f"{last:,} steps in {_duration(seconds)}"
    return f"{last:,} steps" + (f", the last {last - first:,} in {_duration(seconds)}" if last > first else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
