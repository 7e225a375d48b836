"""A vocabulary over ranks against one process, with gloo: the largest differences, bits, memory and traffic, as tables.

Usage: python tests/vocab_parallel.py [--ranks 1 2 3 4] [--impls cpp torch] [--write FILE]; with TRITON_INTERPRET=1 and
--impls triton a few small cases in Triton's interpreter. Ends with an error where a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vocab_ranks import EVERY, FEW, Case, as_rank, compare

MODES = ("score", "frozen", "keep", "mixed", "recompute")
# Largest differences allowed: of log-probs and statistics absolute (logits reach 9), of gradients relative. A float32
# sum over other parts differs in its last digits; a gradient in bfloat16 may round to its neighbour.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-8), torch.float64: (1e-12, 1e-12)}
KINDS = ("log_probs", "statistics", "d hidden", "d weight", "d bias", "d low_rank.a", "d low_rank.b")


def cases(impl: str) -> list[Case]:
    if impl == "triton":
        small = {"shape": (40, 16, 131)}
        return [
            *(
                Case(impl, mode, outputs=FEW if mode != "recompute" else EVERY, **small)
                for mode in ("score", "frozen", "keep", "recompute")
            ),  # type: ignore[arg-type]  # noqa: E501
            Case(impl, "keep", form="dtensor", hidden="split", rank=3, **small),  # type: ignore[arg-type]
        ]
    made = [Case(impl, mode, dtype, outputs) for mode in MODES for dtype in (torch.float32, torch.bfloat16)
            for outputs in ((), FEW)]  # fmt: skip
    made += [Case(impl, mode, outputs=EVERY) for mode in ("score", "recompute")]
    made += [Case(impl, mode, form="dtensor", hidden=hidden) for mode in ("frozen", "keep", "recompute")
             for hidden in ("whole", "split")]  # fmt: skip
    made += [Case(impl, mode, rank=4, form=form) for mode in ("keep", "recompute") for form in ("shard", "dtensor")]
    made += [Case(impl, "keep", shape=(64, 16, 3)), Case(impl, "keep", hidden="split", shape=(5, 16, 70))]
    if impl == "torch":
        made += [Case(impl, mode, torch.float64, FEW) for mode in ("frozen", "keep", "recompute")]
    return made


def broken(case: Case, values: dict[str, float], same_bits: bool) -> list[str]:
    values_bound, gradients_bound = BOUNDS[case.dtype]
    found = [
        f"{case}: {name} differs by {value:.1e}"
        for name, value in values.items()
        if not value <= (values_bound if name == "log_probs" or name in EVERY else gradients_bound)
    ]
    return found + ([] if same_bits else [f"{case}: ranks differ in their bits"])


def differences(listed: list[Case], to: str) -> None:
    """Runs on a rank; writes what it found."""
    found = []
    for case in listed:
        try:
            made = compare(case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
        found.append((made.values, made.same_bits))
    Path(to, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def spawn(ranks: int, function: Any, *arguments: Any) -> None:
    """function(*arguments) on each rank; the last argument is a folder to write to."""
    mp.spawn(as_rank, (ranks, f"{arguments[-1]}/store", function, arguments), ranks)


def on_ranks(ranks: int, function: Any, *arguments: Any) -> list[Any]:
    """What each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(ranks, function, *arguments, folder)
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--impls", nargs="+", default=["cpp", "torch"])
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong, rows = [], []
    for impl in args.impls:
        listed = cases(impl)
        for ranks in args.ranks:
            found = on_ranks(ranks, differences, listed)
            for i, case in enumerate(listed):
                for values, same_bits in (of_rank[i] for of_rank in found):
                    wrong += broken(case, values, same_bits)
            for dtype in dict.fromkeys(case.dtype for case in listed):
                rows.append(row(impl, ranks, dtype, listed, found))
                print(rows[-1], flush=True)
    print("\n".join(wrong) or "all within their bounds")
    sys.exit(bool(wrong))


def row(impl: str, ranks: int, dtype: torch.dtype, listed: list[Case], found: list[Any]) -> str:
    from vocab_ranks import kind_of

    worst = dict.fromkeys(KINDS, 0.0)
    same, count = True, 0
    for i, case in enumerate(listed):
        if case.dtype == dtype:
            count += 1
            for values, same_bits in (of_rank[i] for of_rank in found):
                same &= same_bits
                for name, value in values.items():
                    worst[kind_of(name)] = max(worst[kind_of(name)], value)
    numbers = " | ".join(f"{worst[kind]:.1e}" for kind in KINDS)
    return f"| {impl} | {ranks} | {str(dtype)[6:]} | {count} | {numbers} | {'equal' if same else 'DIFFER'} |"


if __name__ == "__main__":
    main()
