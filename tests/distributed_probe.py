"""Run by torchrun on two processes: the gradients of a fused head under DDP and FSDP2 are those of one process.

Usage: torchrun --nproc_per_node 2 distributed_probe.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from helpers import assert_close
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_helpers import Pairs, Trees, make_model, make_trainer

from dpo_kernels.training import DPOConfig, FusedHead, PairCollator
from dpo_kernels.training.adapters import switched_off
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.output_head import below_adapters
from dpo_kernels.training.reference import OwnStart

NAMES = [("Llama", {}), ("Qwen3", {"tie_word_embeddings": True}), ("Phi", {"num_key_value_heads": 4})]


def shard(model):
    """Every layer, the embedding and the head a unit of its own, each freed after its forward."""
    mesh, inner = init_device_mesh("cpu", (dist.get_world_size(),)), below_adapters(model)
    units = list(inner.model.layers)
    if inner.lm_head.weight is not inner.model.embed_tokens.weight:
        units += [inner.model.embed_tokens, inner.lm_head]
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model


def make_adapted():
    """With LoRA in its attention and on its head."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    model = get_peft_model(make_model("Llama"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def check_adapters(ids: torch.Tensor, labels: torch.Tensor) -> None:
    """An adapter's gradients, and the model with it switched off, are those of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, base = make_adapted(), make_model("Llama")
    FusedHead(alone), FusedHead(base)
    (alone(input_ids=ids, labels=labels)["log_probs"].sum() / world).backward()
    expected = base(input_ids=ids[rank::world], labels=labels[rank::world])["log_probs"]
    exact = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    for wrap in (DistributedDataParallel, shard):
        model = make_adapted()
        FusedHead(model)
        wrapped = wrap(model)
        for _ in range(2):
            model.zero_grad()
            with torch.no_grad(), switched_off(model):
                off = wrapped(input_ids=ids[rank::world], labels=labels[rank::world])["log_probs"]
            assert_close(off, expected, 1e-5, f"{wrap.__name__} without its adapter")
            wrapped(input_ids=ids[rank::world], labels=labels[rank::world])["log_probs"].sum().backward()
            first = wrapped(input_ids=ids[rank::world], labels=labels[rank::world])["log_probs"].detach()
        check_own_start(model, wrapped, ids[rank::world], labels[rank::world], first)
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == exact.keys()
        for name, grad in found.items():
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert_close(whole, exact[name], 2e-4, f"adapter {wrap.__name__} {name}")


class WithFSDP2(Accelerator):
    is_fsdp2 = True


def check_own_start(model, wrapped, ids: torch.Tensor, labels: torch.Tensor, first: torch.Tensor) -> None:
    """A trained adapter's first values serve as reference while it changes, and it is left as it is."""
    args = DPOConfig(output_dir="unused", use_cpu=True)
    accelerator, is_sharded = WithFSDP2(cpu=True), wrapped is model
    # As before it is wrapped: whole values.
    start = OwnStart(make_adapted(), accelerator, args, Layout("padded"), is_sharded, lambda: wrapped, is_base=False)
    start.policy = model
    batch = SimpleNamespace(lying=lambda layout: SimpleNamespace(run=lambda m: m(input_ids=ids, labels=labels)))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            p.mul_(1.5)
        moved = wrapped(input_ids=ids, labels=labels)["log_probs"]
        assert (moved - first).abs().max() > 1e-3
        assert_close(start.score(batch), first, 1e-5, "the adapter as it was at the start")
        assert torch.equal(wrapped(input_ids=ids, labels=labels)["log_probs"], moved)
        for p, value in zip(trained, before, strict=True):
            p.copy_(value)


def check_layouts() -> None:
    """Each process has rows of its own length; a group more or less is within one forward."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = Trees()
    cases = (Layout("bucketed"), Layout("shared", "branches"), Layout("shared", "mask"), Layout("shared", "cache"))
    alone = make_model("Qwen3")
    FusedHead(alone)
    (PairBatch(PairCollator()(pairs.items)).run(alone)["log_probs"].sum() / world).backward()
    for layout in cases:
        for wrap in (DistributedDataParallel, shard)[: 1 if layout.goes_in_groups else 2]:
            model = make_model("Qwen3")
            FusedHead(model)
            use_branches(model, layout.attention == "branches")
            wrapped = wrap(model)
            batch = PairBatch(PairCollator()(pairs.items[rank::world]), layout)
            for _ in range(2):
                model.zero_grad()
                batch.run(wrapped)["log_probs"].sum().backward()
            for (key, parameter), exact in zip(model.named_parameters(), alone.parameters(), strict=True):
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                assert_close(grad, exact.grad, 2e-4, f"{layout} {wrap.__name__} {key}")


def check_parts() -> None:
    """Processes have different numbers of parts, one of them a single one, and reduce once a step all the same, after a
    batch whose gradients wait (accumulation)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs, layout = Trees(), Layout("bucketed", answers_at_once=2)
    alone = make_model("Qwen3")
    FusedHead(alone)
    own = PairCollator()(pairs.items[:3] if rank == 0 else pairs.items[3:])
    (2 * PairBatch(PairCollator()(pairs.items)).run(alone)["log_probs"].sum() / world).backward()
    for finds_unused in (False, True):
        model = make_model("Qwen3")
        FusedHead(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=finds_unused)
        for _ in range(3):  # after the first step DDP makes its buckets anew
            model.zero_grad()
            with wrapped.no_sync():
                PairBatch(own, layout).run(wrapped)["log_probs"].sum().backward()
            PairBatch(own, layout).run(wrapped)["log_probs"].sum().backward()
            for (key, parameter), exact in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert_close(parameter.grad, exact.grad, 2e-4, f"{layout} {key}")


def check_that_an_evaluation_before_training_keeps_ddp() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), eval_pairs=Pairs(2), per_device_train_batch_size=1, max_steps=2)
        trainer.evaluate()
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        others = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(others, parameter.detach())
        assert all(torch.equal(other, parameter) for other in others), f"{name} differs between processes"


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (4, 9))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, :4] = -100
    for name, options in NAMES:
        alone = make_model(name, options)
        FusedHead(alone)
        (alone(input_ids=ids, labels=labels)["log_probs"].sum() / world).backward()
        for wrap in (DistributedDataParallel, shard):
            model = make_model(name, options)
            head = FusedHead(model)
            head.check(model)
            wrapped = wrap(model)
            for _ in range(2):  # a second step sees freed weights come back
                model.zero_grad()
                wrapped(input_ids=ids[rank::world], labels=labels[rank::world])["log_probs"].sum().backward()
            for (key, parameter), exact in zip(model.named_parameters(), alone.parameters(), strict=True):
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                assert_close(grad, exact.grad, 2e-4, f"{name} {wrap.__name__} {key}")
    check_adapters(ids, labels)
    check_layouts()
    check_parts()
    check_that_an_evaluation_before_training_keeps_ddp()
    print(f"rank {rank}: as one process", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way (torch 2.13)


if __name__ == "__main__":
    main()
