"""Run by torchrun: rows of tokens that are split over processes give the log-probs, the loss and the gradients of one.

Usage: torchrun --nproc_per_node N sequence_probe.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from helpers import assert_close
from training_helpers import Trees, make_model

from dpo_kernels.losses import dpo_loss
from dpo_kernels.training import FusedHead, PairCollator
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.processes import leave
from dpo_kernels.training.sequence_parallel import Split, over

MODELS = [("Llama", {}), ("Qwen3", {"tie_word_embeddings": True}),
          ("Mistral", {"sliding_window": 9}), ("Gemma2", {"sliding_window": 9})]  # fmt: skip


def check_sums(split: Split) -> None:
    """A loss of whole sums, of which each process has a part: the sum, and the gradient of the own part."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    whole = torch.randn(3, split.padded(11 * world), dtype=torch.float64)
    exact = whole.clone().requires_grad_()
    exact.sum(1).square().sum().backward()
    own = whole[:, split.columns(whole.shape[1])].clone().requires_grad_()
    made = split.whole(own)
    assert torch.equal(made, whole), "not the rows in their order"
    made.sum(1).square().sum().backward()
    assert torch.equal(own.grad, exact.grad[:, split.columns(whole.shape[1])])
    shared = whole[:, split.columns(whole.shape[1])].clone().requires_grad_()
    (split.gathered(shared, 1) * (rank + 1)).sum().backward()  # another use on each process: the sum of them
    assert torch.equal(shared.grad, torch.full_like(shared, world * (world + 1) / 2))


def check_model(name: str, options: dict, split: Split) -> None:
    batch = PairBatch(PairCollator()(Trees().items))
    mask = batch.mask
    found = []
    for parted in (None, split):
        model = make_model(name, options)
        FusedHead(model)
        use_branches(model, parted is not None)
        log_probs = batch.run(over(model, parted))["log_probs"]
        loss, *_ = dpo_loss(torch.zeros_like(log_probs), log_probs, mask)
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        if parted is not None:
            others = [torch.empty_like(log_probs) for _ in range(dist.get_world_size())]
            dist.all_gather(others, log_probs.detach())
            assert all(torch.equal(other, log_probs) for other in others), "processes see other log-probs"
            for grad in grads:
                dist.all_reduce(grad)  # each has the part of its tokens, to be averaged
                grad /= dist.get_world_size()
        found.append((log_probs.detach(), loss.detach(), grads))
    for one, parts in zip(found[0][:2], found[1][:2], strict=True):
        assert_close(parts, one, 1e-5, name)
    for one, parts in zip(found[0][2], found[1][2], strict=True):
        assert_close(parts, one, 2e-4, f"a gradient of {name}")


def main() -> None:
    dist.init_process_group("gloo")
    split = Split(dist.group.WORLD)
    check_sums(split)
    for name, options in MODELS:
        check_model(name, options, split)
    print(f"rank {dist.get_rank()}: as one process", flush=True)
    leave(60)


if __name__ == "__main__":
    main()
