"""What the example's model is taught before it is aligned: to speak, with good and bad manners alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training import checkpoints, layout_check
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.loading import load_model
from dpo_kernels.training.model import FusedHead

FOLDER = "before"  # of the taught model, in the output of a run: what it started from
EPOCHS, PAIRS, LEARNING_RATE, WARMUP = 14, 16, 3e-3, 20


def taught_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, dataset: DPODataset, output_dir: Path, epochs: int
) -> Any:
    """The model that a run of the example starts from: taught now and saved, or, where a run goes on, as it was saved.

    Args:
        model: random, of the kind that is saved.
        dataset: the pairs that are trained on; held-out ones stay unseen.
        epochs: how often it sees each answer; 0: it stays random, and nothing is saved.
    """
    folder = output_dir / FOLDER
    if (folder / "config.json").is_file():
        return load_model(str(folder), dtype=torch.float32)
    if epochs > 0:
        teach(model, dataset, epochs)
        staged = checkpoints.staging(folder) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        checkpoints.publish_files(staged, folder)
    return model


def teach(model: Any, dataset: DPODataset, epochs: int = EPOCHS, seed: int = 0, show: bool = True) -> float:
    """Trains a model on the chosen and the rejected answers alike (the negative log-likelihood of both, a token), in
    place and on its device; returns the last loss in nats a token.

    The same model, pairs and seed give the same weights on the same machine.
    """
    generator = torch.Generator().manual_seed(seed)
    items, collate = [dataset[i] for i in range(len(dataset))], PairCollator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    device = next(model.parameters()).device
    total = epochs * -(-len(items) // PAIRS)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * (1 - 0.95 * step / total)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def batches() -> Iterator[PairBatch]:
        for _ in range(epochs):
            for places in torch.randperm(len(items), generator=generator).split(PAIRS):
                inputs = collate([items[int(i)] for i in places])
                yield PairBatch({name: tensor.to(device) for name, tensor in inputs.items()}, layout)

    loss = torch.zeros(())
    with FusedHead(model), tqdm(batches(), total=total, desc="teaching both kinds of answers", disable=not show) as bar:
        layout = layout_check.choose(model, "auto", dataset, PAIRS).layout
        use_branches(model, layout.attention == "branches")
        model.train()
        for batch in bar:
            loss = -batch.run(model)["log_probs"][batch.mask].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return loss.item()
