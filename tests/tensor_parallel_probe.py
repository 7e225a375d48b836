"""Run by torchrun on 2 or 4 processes: a fused head on a model whose weights are split is that of one process.

Two processes: transformers' tensor parallelism and PyTorch's own. Four: both of transformers' dimensions, 2 x 2.
Usage: torchrun --nproc_per_node N tests/tensor_parallel_probe.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from helpers import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training_helpers import make_model
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from dpo_kernels.training import FusedHead
from dpo_kernels.training.output_head import HeadError, OutputHead

NAMES = [("Llama", {}), ("Qwen3", {"tie_word_embeddings": True}), ("Gemma2", {}), ("Phi", {"num_key_value_heads": 4})]


def gradients(model: Any, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    found = model(input_ids=ids, labels=labels, use_cache=False, **options)["log_probs"]
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found.detach(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def compare(what: str, model: Any, alone: Any, ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Log-probs, every gradient and the plain logits."""
    exact, exact_grads = gradients(alone, ids, labels)
    for _ in range(2):
        found, grads = gradients(model, ids, labels)
        assert_close(found, exact, 1e-5, f"{what} log-probs")
        others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(others, found)
        assert all(torch.equal(found, other) for other in others), f"{what}: ranks differ"
        assert grads.keys() == exact_grads.keys(), f"{what}: {grads.keys() ^ exact_grads.keys()}"
        for name, grad in grads.items():
            scale = max(1.0, exact_grads[name].abs().max().item())
            assert_close(grad, exact_grads[name], 1e-5 * scale, f"{what} {name}")
    with torch.no_grad():
        assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits, 1e-5, f"{what} logits")


def loaded(alone: Any, **options: Any) -> Any:
    """The same weights, split as they are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        names = [folder]
        dist.broadcast_object_list(names)
        if dist.get_rank() == 0:
            alone.save_pretrained(names[0])
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(names[0], dtype=torch.float32, **options)
        dist.barrier()
    return model.train()


def check_tensor_parallel(name: str, config: dict, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> None:
    alone = make_model(name, config)
    model = loaded(alone, **options)
    before = vars(model.lm_head).get("forward")
    assert isinstance(model.lm_head.weight, DTensor), f"{name}: the head is whole"
    fused, exact = FusedHead(model), FusedHead(alone)
    exact.check(alone)
    fused.check(model)
    assert fused.transform == exact.transform
    compare(f"{name} {options}", model, alone, ids, labels)
    if options.get("tp_plan"):
        places = torch.tensor([0, 3, 5, 9])
        some = labels.clamp(min=0).flatten()[places][None]
        got, want = (m(input_ids=ids, labels=some, places=places)["log_probs"] for m in (model, alone))
        assert_close(got, want, 1e-5, f"{name} places")
    fused.unfuse(model)
    exact.unfuse(alone)
    assert not isinstance(model.lm_head, OutputHead)
    assert vars(model.lm_head).get("forward") is before
    assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits, 1e-5, f"{name} unfused")


def check_pytorch_styles(ids: torch.Tensor, labels: torch.Tensor) -> None:
    """PyTorch's own hooks around a head: outputs gathered, or refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone, model = make_model("Llama"), make_model("Llama")
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    exact, fused = FusedHead(alone), FusedHead(model)
    exact.check(alone)
    fused.check(model)
    compare("parallelize_module", model, alone, ids, labels)
    model = make_model("Llama")
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    try:
        FusedHead(model).check(model)
    except HeadError as error:
        assert "turns 12 numbers from its head into logits of" in str(error), error
    else:
        raise AssertionError("a head whose logits stay split was taken")


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (4, 9))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, :4] = -100
    if dist.get_world_size() == 4:
        for name, config in NAMES[:2]:
            check_tensor_parallel(name, config, ids, labels, distributed_config=DistributedConfig(tp_size=2, fsdp_size=2))
    else:
        for name, config in NAMES:
            check_tensor_parallel(name, config, ids, labels, tp_plan="auto")
        check_pytorch_styles(ids, labels)
    print(f"rank {dist.get_rank()}: as one process", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way (torch 2.13)


if __name__ == "__main__":
    main()
