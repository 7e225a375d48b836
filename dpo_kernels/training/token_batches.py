"""Batches of as many pairs as so many tokens hold, as the layout of a run counts them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

from dpo_kernels.training.batch import PairCollator, pair_tokens
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.layouts import Layout, PairTokens, fill, most_tokens

WINDOW = 1024  # pairs, among which those that fill a batch are looked for
EPOCHS = 4  # whose batches are counted at the start


class TokenBatches(Sampler[list[int]]):
    """The batches of an epoch: each pair once, in batches of at most so many tokens, filled by first-fit decreasing
    within windows of the shuffled pairs.

    The order is a function of seed, epoch and lengths, so that every process has the same one and a resumed run goes on
    in it. Every epoch has equally many batches, as transformers' count of steps wants it, and a multiple of the
    processes: the fullest batches of an epoch that needs fewer are split.

    Args:
        pairs: how long each pair is.
        layout: of the run, which tells the tokens of a batch.
        tokens: the most that a model may be given at once, padding too.
        seed: of the order.
        processes: each has its share of the batches.
        shuffled: whether pairs and batches are shuffled.

    Attributes:
        repeated: so many of the last batches repeat a pair, for processes that have nothing left.

    Raises:
        ValueError: a pair alone has more tokens.
    """

    def __init__(
        self,
        pairs: Sequence[PairTokens],
        layout: Layout,
        tokens: int,
        *,
        seed: int = 0,
        processes: int = 1,
        shuffled: bool = True,
    ) -> None:
        self.pairs, self.layout, self.tokens = pairs, layout, tokens
        self.seed, self.shuffled, self.epoch = seed, shuffled, 0
        self.sizes = [most_tokens(layout, [pair]) for pair in pairs]
        self._check()
        needed = max(len(self._filled(epoch)) for epoch in range(EPOCHS if shuffled else 1))
        self._count = -(-needed // processes) * processes
        self.repeated = max(0, self._count - len(pairs))

    def _check(self) -> None:
        longest = int(np.argmax(self.sizes)) if self.sizes else 0
        if self.sizes and self.sizes[longest] > self.tokens:
            prompt, chosen, rejected = self.pairs[longest]
            raise ValueError(
                f"tokens_per_batch is {self.tokens:,}, and pair {longest} alone has {self.sizes[longest]:,} in "
                f"{self.layout.name} rows (prompt {prompt:,}, answers {chosen:,} and {rejected:,}); give at least "
                "that many, or a smaller max_length"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Of all processes together."""
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(self.epoch)
        yield from batches
        for _ in range(self.repeated):
            yield batches[0][:1]

    def _batches(self, epoch: int) -> list[list[int]]:
        batches = [*self._filled(epoch)]
        if len(batches) > self._count:  # one that came out worse than the first ones
            batches = [*self._filled(epoch % EPOCHS)]
        while len(batches) < self._count - self.repeated:
            fullest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches.pop(fullest)
            batches += [batch[::2], batch[1::2]]
        if self.shuffled:
            self._random(epoch, 1).shuffle(batches)
        return batches

    @functools.lru_cache(maxsize=EPOCHS + 1)  # noqa: B019  (a run has one of these)
    def _filled(self, epoch: int) -> list[list[int]]:
        count = len(self.pairs)
        order = self._random(epoch, 0).permutation(count) if self.shuffled else np.arange(count)
        batches = []
        for begin in range(0, count, WINDOW):
            window = order[begin : begin + WINDOW].tolist()

            def tokens(places: list[int], window: list[int] = window) -> int:
                return most_tokens(self.layout, [self.pairs[window[place]] for place in places])

            rows = fill([self.sizes[i] for i in window], self.tokens, None if self.layout.adds_up else tokens)
            batches += [[window[place] for place in row] for row in rows]
        return batches

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])

    @property
    def told(self) -> str:
        """In a sentence, what the batches of the first epoch are."""
        batches = self._batches(0)
        tokens = [most_tokens(self.layout, [self.pairs[i] for i in batch]) for batch in batches]
        pairs = [len(batch) for batch in batches]
        return (
            f"batches: {len(self):,} an epoch, of {sum(tokens) / len(tokens):,.0f} tokens and "
            f"{len(self.pairs) / len(batches):,.1f} pairs on average, {max(tokens):,} tokens and {max(pairs):,} pairs "
            "at most"
        )


def token_batches(dataset: Any, layout: Layout, args: DPOConfig) -> TokenBatches:
    """
    Raises:
        TypeError: the dataset cannot be looked through beforehand.
        ValueError: a pair alone has more than args.tokens_per_batch.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"tokens_per_batch needs to know all lengths, and a {type(dataset).__name__} cannot be looked through; "
            "give per_device_train_batch_size"
        )
    return TokenBatches(
        [pair_tokens(dataset[i]) for i in range(len(dataset))], layout, args.tokens_per_batch or 0,
        seed=args.seed if args.data_seed is None else args.data_seed, processes=args.world_size,
        shuffled=args.train_sampling_strategy == "random",
    )  # fmt: skip


def loader(dataset: Any, batches: TokenBatches, args: DPOConfig, accelerator: Accelerator) -> Any:
    """The batches of this process."""
    workers = args.dataloader_num_workers
    made: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=batches, collate_fn=PairCollator(), num_workers=workers,
        pin_memory=args.dataloader_pin_memory, persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=functools.partial(seed_worker, num_workers=workers, rank=args.process_index),
    )  # fmt: skip
    even = accelerator.even_batches
    accelerator.even_batches = False  # they are: a multiple of the processes
    try:
        return accelerator.prepare(made)
    finally:
        accelerator.even_batches = even
