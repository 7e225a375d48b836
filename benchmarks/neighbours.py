"""A step on a CPU beside processes that keep cores busy, in turn with PyTorch's own operations: a table of both.

python -m benchmarks.neighbours [--threads 2 4 8] [--busy 0 1 2]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import torch

from benchmarks.measure import Effort, interleave
from benchmarks.results import markdown_table
from dpo_kernels import hidden_to_log_probs

TOKENS, FEATURES, VOCAB = 256, 512, 32_000


def medians(threads: int, busy: int) -> dict[str, float]:
    """Seconds of a step, forward and backward, beside so many busy processes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, FEATURES).bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, FEATURES) / FEATURES**0.5).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,))

    def ours() -> None:
        torch.autograd.grad(hidden_to_log_probs(hidden, weight, labels, impl="cpp").sum(), (hidden, weight))

    def plain() -> None:
        log_probs = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, labels[:, None])
        torch.autograd.grad(log_probs.sum(), (hidden, weight))

    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        runs = {"ours": ours, "plain": plain}
        rounds, _ = interleave(runs, Effort(seconds=0, max_rounds=14), torch.device("cpu"), min_rounds=14)
    finally:
        for process in neighbours:
            process.kill()
    return {name: statistics.median(times[name] for times in rounds[2:]) for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        for busy in options.busy:
            found = medians(threads, busy)
            times = [f"{1000 * seconds:.0f}" for seconds in found.values()]
            rows.append((str(threads), str(busy), *times, f"{found['ours'] / found['plain']:.2f}"))
    print(markdown_table(("threads:", "busy processes:", "ours, ms:", "PyTorch, ms:", "ratio:"), rows))


if __name__ == "__main__":
    main()
