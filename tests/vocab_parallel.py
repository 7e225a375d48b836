"""A vocabulary over ranks against one process, with gloo: the largest differences, bits, memory and traffic, as tables.

Usage: python tests/vocab_parallel.py [--ranks 1 2 3 4] [--impls cpp torch]; with TRITON_INTERPRET=1 and --impls triton
a few small cases in Triton's interpreter. Ends with an error where a bound is broken.

"wire" is what the loopback device sent: it means something where nothing else does, as in a network namespace
(unshare -rn sh -c "ip link set lo up; python tests/vocab_parallel.py").
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vocab_ranks import EVERY, FEW, Case, as_rank, compare, kind_of, on_a_ring
from vocab_traffic import HELD, held, traffic

MIB = 2**20

MODES = ("score", "frozen", "keep", "mixed", "recompute")
# Largest differences allowed: of log-probs and statistics absolute (logits reach 9), of gradients relative. A float32
# sum over other parts differs in its last digits; a gradient in bfloat16 may round to its neighbour.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-8), torch.float64: (1e-12, 1e-12)}
KINDS = ("log_probs", "statistics", "d hidden", "d weight", "d bias", "d low_rank.a", "d low_rank.b")


def cases(impl: str) -> list[Case]:
    if impl == "triton":
        shape = (40, 16, 131)
        made = [Case(impl, mode, outputs=FEW, shape=shape) for mode in ("score", "frozen", "keep")]
        made.append(Case(impl, "recompute", outputs=EVERY, shape=shape))
        return [*made, Case(impl, "keep", form="dtensor", hidden="split", rank=3, shape=shape)]
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


def differences(to: str, listed: list[Case]) -> None:
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
    """function(*arguments) on each rank; the first argument is a folder to write to."""
    mp.spawn(as_rank, (ranks, f"{arguments[0]}/store", function, arguments), ranks)


def on_ranks(ranks: int, function: Any, *arguments: Any) -> list[Any]:
    """What each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(ranks, function, folder, *arguments)
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--impls", nargs="+", default=["cpp", "torch"])
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong: list[str] = []
    print("| impl | ranks | dtype | calls |", " | ".join(KINDS), "| bits |")
    for impl in args.impls:
        listed = cases(impl)
        for ranks in args.ranks:
            found = on_ranks(ranks, differences, listed)
            for i, case in enumerate(listed):
                for values, same_bits in (of_rank[i] for of_rank in found):
                    wrong += broken(case, values, same_bits)
            for dtype in dict.fromkeys(case.dtype for case in listed):
                print(row(impl, ranks, dtype, listed, found), flush=True)
    if args.impls != ["triton"]:
        for ranks in args.ranks:
            wrong += sent(ranks)
        wrong += memory(max(args.ranks), args.impls)
    print("\n".join(wrong) or "all within their bounds")
    sys.exit(bool(wrong))


def memory(ranks: int, impls: list[str]) -> list[str]:
    """Held by the rank that held most, MiB; a plan bounds it but for what libraries take at their first call."""
    wrong = []
    for impl, mode, hidden_dim in itertools.product(impls, HELD, (None, 1)):
        found = on_ranks(ranks, held, impl, mode, hidden_dim)
        most, planned = (max(of_rank[name] for of_rank in found) for name in ("held", "planned"))
        name = f"{impl} {mode}{'' if hidden_dim is None else ', hidden split'}"
        print(f"| held | {ranks} ranks | {name} | {most / MIB:.1f} | plan {planned / MIB:.1f} |", flush=True)
        if most > planned:
            wrong.append(f"{name} on {ranks} ranks: held {most:,} bytes, the plan says {planned:,}")
    return wrong


def sent(ranks: int) -> list[str]:
    """Bytes that a step sends from a rank, MiB: the plan's payloads on a ring, what was counted, and the wire's."""
    wrong = []
    for name, of in on_ranks(ranks, traffic)[0].items():
        counted, wire = on_a_ring(of["sizes"], ranks), of["wire"] / ranks
        line = f"| sent | {name} | {ranks} ranks | counted {counted / MIB:.3f} | wire {wire / MIB:.3f} |"
        if "planned" in of:
            kinds: dict[str, int] = {}
            for what, size in of["planned"].items():
                kind = what.split(",")[0].replace("-", "_")
                kinds[kind] = kinds.get(kind, 0) + size
            line += f" planned {on_a_ring(kinds, ranks) / MIB:.3f} |"
            if kinds != of["sizes"]:
                wrong.append(f"{name} on {ranks} ranks: sent {of['sizes']}, the plan says {kinds}")
        print(line, flush=True)
    return wrong


def row(impl: str, ranks: int, dtype: torch.dtype, listed: list[Case], found: list[Any]) -> str:
    worst: dict[str, float] = {}
    same, count = True, 0
    for i, case in enumerate(listed):
        if case.dtype == dtype:
            count += 1
            for values, same_bits in (of_rank[i] for of_rank in found):
                same &= same_bits
                for name, value in values.items():
                    worst[kind_of(name)] = max(worst.get(kind_of(name), 0.0), value)
    numbers = " | ".join(f"{worst[kind]:.1e}" if kind in worst else "" for kind in KINDS)
    return f"| {impl} | {ranks} | {str(dtype)[6:]} | {count} | {numbers} | {'equal' if same else 'DIFFER'} |"


if __name__ == "__main__":
    main()
