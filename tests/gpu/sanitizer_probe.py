"""Every kernel once or more, at small ragged shapes, for compute-sanitizer. Usage: python sanitizer_probe.py DEVICE."""

from __future__ import annotations

import itertools
import sys

import torch
from gpu_helpers import planned
from helpers import ALL, MODES, PLAIN, head_on

from dpo_kernels import logits_to_log_probs, token_stats
from dpo_kernels.overrides import override
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

FILTERS = (2**-6, 2**-20)  # most tiles keep few columns, and most
SHAPE = {"cuda": (530, 272, 1100), "cpu": (70, 48, 300)}


def main() -> None:
    device, calls = torch.device(sys.argv[1]), 0
    modes = ("score", "frozen", "keep", "recompute")
    dtypes = (torch.bfloat16, torch.float32)
    kinds = ((torch.bfloat16, PLAIN), (torch.bfloat16, ALL), (torch.float32, ALL))
    for strategy, mode, (dtype, options) in itertools.product(("fused", "tiles"), modes, kinds):
        with override(kernels={"strategy": strategy}):
            head = head_on(device, *SHAPE[device.type], dtype, grads=MODES[mode], bias=bool(options))
            made = token_stats(
                *head, outputs=(), memory_budget=planned(head, mode).bytes + 2**22, impl="triton", **options
            )
            if mode != "score":
                made.log_probs.sum().backward()
            calls += 1
    for strategy, dtype, grads in itertools.product(("fused", "tiles"), dtypes, ("none", "hidden,weight,bias")):
        with override(kernels={"strategy": strategy}):
            head = head_on(device, *SHAPE[device.type], dtype, grads=grads, bias=True)
            made = token_stats(*head, outputs=OPTIONAL_OUTPUTS, impl="triton", **ALL)
            if grads != "none":
                (made.log_probs + made.entropy).sum().backward()
            calls += 1
    for dtype, options, share in itertools.product(dtypes, (PLAIN, ALL), FILTERS):
        head = head_on(device, *SHAPE[device.type], dtype, grads="hidden,weight,bias", bias=bool(options))
        with torch.no_grad():
            head.weight.mul_(30 * torch.arange(len(head.weight), device=device).neg().div(100).exp()[:, None])
        token_stats(*head, outputs=(), gradient_filter=share, impl="triton", **options).log_probs.sum().backward()
        calls += 1
    for dtype, options, ignored in itertools.product(dtypes, (PLAIN, ALL), (0, 5)):
        logits = torch.randn(33, 4099, device=device).to(dtype).requires_grad_()
        labels = torch.randint(4099, (33,), device=device)
        labels[:ignored] = -100
        logits_to_log_probs(logits, labels, impl="triton", **options).sum().backward()
        calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"done: {calls} calls")


if __name__ == "__main__":
    main()
