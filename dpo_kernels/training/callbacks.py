"""What happens around the steps: a progress bar, a log on disk with curves, and orderly ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dpo_kernels.training.data import write_whole
from dpo_kernels.training.processes import anywhere
from dpo_kernels.training.report import LOG_NAME, save_curves
from dpo_kernels.training.report.metrics import shown
from dpo_kernels.warn import warn

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "tokens_per_second")


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; the weights of the last good step are saved."""


class Progress(ProgressCallback):
    """A bar with the latest figures behind it, instead of a line a step."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(dict(shown(logs, SHOWN)))


class RunLog(TrainerCallback):
    """Every log entry as a line of JSON in output_dir, and the curves as a picture at each save and at the end.

    A disk that is full ends no training here: a warning says what cannot be written, and the log is written again from
    the trainer's history as soon as that works.
    """

    def __init__(self) -> None:
        self._behind = False  # the file lacks lines

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._behind = False
        if state.is_world_process_zero:
            # After a resume the history ends at the checkpoint: steps beyond it are done again.
            self._write(lambda: self._write_all(args, state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and state.log_history):
            return
        add = self._write_all if self._behind else self._add_last
        self._write(lambda: add(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            try:
                _draw(args, state, kwargs.get("model"))
            except OSError as error:
                self._tell(error)

    on_train_end = on_evaluate = on_save

    def _write_all(self, args: TrainingArguments, state: TrainerState) -> None:
        write_whole(self._path(args), "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def _add_last(self, args: TrainingArguments, state: TrainerState) -> None:
        with self._path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._behind = False
        except OSError as error:
            self._tell(error)
            self._behind = True

    def _tell(self, error: OSError) -> None:
        if not self._behind:
            warn(f"log and curves cannot be written ({error}); training goes on without")

    def _path(self, args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)) / LOG_NAME


def _draw(args: Any, state: TrainerState, model: Any) -> None:
    """The curves, under a title of folder, model, losses, and the two numbers that are tried first."""
    name = Path(str(getattr(getattr(model, "config", None), "_name_or_path", ""))).name or type(model).__name__
    options = f"{' + '.join(args.loss_type)}, beta {args.beta:g}, learning rate {args.learning_rate:g}"
    folder = Path(str(args.output_dir))
    save_curves(state.log_history, folder, f"{folder.name}: {name}, {options}", args.loss_type)


class StopOnSignal(TrainerCallback):
    """A SIGTERM or SIGINT to any process lets the step end, saves a checkpoint and stops all of them.

    A second SIGINT interrupts at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        self.number: int | None = None  # of the signal, where it came to this process
        self.ending = self.saved = False  # the step has ended; its checkpoint is in its place

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the length of a training; the handlers that were there before come back after it."""
        self.received, self.number, self._listener = False, None, os.getpid()
        self.ending = self.saved = False
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread alone
            return
        heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._remember) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.received = anywhere(self.accelerator, self.received)
        if self.received:
            control.should_save = control.should_training_stop = self.ending = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = self.ending

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:  # a forked worker
            if number == signal.SIGTERM:  # meant for it
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # a terminal sends its SIGINT to all: the step needs the worker
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received, self.number = True, number
        again = ", again to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again}\n".encode())


class SyncReference(TrainerCallback):
    """After every so many steps the reference moves towards the policy.

    Args:
        follow: moves it, by the policy's share.
    """

    def __init__(self, follow: Callable[[nn.Module, float], None], share: float, steps: int) -> None:
        self.follow, self.share, self.steps = follow, share, steps

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if state.global_step % self.steps == 0:
            self.follow(model, self.share)


class StopOnNonFinite(TrainerCallback):
    """Before the optimizer would spread a NaN: save the last good step, then raise.

    Args:
        save_checkpoint: saves the last finished step, and returns its folder.
    """

    def __init__(self, accelerator: Accelerator, save_checkpoint: Callable[[], Path]) -> None:
        self.accelerator, self.save_checkpoint = accelerator, save_checkpoint
        self.step_loss: Tensor | float = 0.0  # of the step that is running, the parts so far

    def add(self, loss: Tensor) -> None:
        """The trainer's word on each part of a step."""
        self.step_loss = self.step_loss + loss

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_loss = 0.0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        bad = [] if bool(torch.isfinite(torch.as_tensor(self.step_loss))) else ["loss"]
        # With fp16 a gradient may overflow: its scaler expects that, and skips the step itself.
        grads = [] if args.fp16 else [_local(p.grad) for p in model.parameters() if p.grad is not None]
        if grads and not bool(torch.stack([n.float() for n in torch._foreach_norm(grads)]).isfinite().all()):
            bad.append("gradient")
        if not anywhere(self.accelerator, bool(bad)):
            return
        folder = self.save_checkpoint()
        raise NonFiniteError(
            f"step {state.global_step + 1}: {' and '.join(bad) or 'the loss of another process'} not finite (loss "
            f"{float(self.step_loss)}); stopped before the update. The last good step is saved in {folder}. "
            "Look at the data of this step, or lower --learning_rate, then go on with --resume_from_checkpoint (and "
            "--allow_changed_data true where you have changed the data)"
        )


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad  # a shard of a DTensor
