"""Compiles what the Triton back end would launch, for chips that are not here, and reads what the compiler made of it.

    python tests/aot.py [--targets sm_80 sm_90 sm_100 gfx942] [--dtypes bfloat16 float32] [--json FILE]
                        [--replace block_m=256 block_n=256 ...] [--write docs/generated/aot.md]

Calls of every mode and option run on CPU tensors, with the target's configurations, and every launch is recorded and
compiled instead of made (benchmarks/compiled.py). --replace plants other numbers in the blocks of products. Must run in
a process of its own: the kernels must not be interpreted here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed

import torch
import triton

from benchmarks.compiled import ROWS, TARGETS, Launch, Target, compile_for, disassembled, specialise, stand_in
from dpo_kernels import logits_to_log_probs, token_stats
from dpo_kernels.backends.triton_tiles import TritonTileOps
from dpo_kernels.overrides import override
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

MULTIPLY = ("forward_kernel", "hopper_forward_kernel", "recompute_kernel", "gather_kernel", "sum_kernel")
SCRATCH = 48 * 2**20  # whatever the chip: budgets below lead to the same modes on all of them
VOCABULARIES = (4000, 32_000, 50_257)  # narrow and wide tiles, and such that are no multiple of 16
SMALL, LARGE = 2**-11, 2**-8  # filters
PLAIN: dict[str, Any] = {}
CAPPED = {"softcap": 30.0, "temperature": 0.7, "logit_scale": 1.3}


def of_each_count(target: Target, counts: list[int]) -> list[set[Launch]]:
    """The launches of calls that differ in their number of tokens alone: two sets would compile a kernel anew."""
    TritonTileOps.multiply = lambda self, out, a, b, add: out.zero_()
    found = []
    for tokens in counts:
        made: set[Launch] = set()

        def record(module: str, name: str, _: int, warps: int, stages: int | None, arguments: dict[str, Any], to=made):
            to.add(specialise(module, name, warps, stages, arguments))
            stand_in(name, arguments, share=float(arguments.get("bound", 1.0) < SMALL))

        for strategy in ("fused", "tiles"):
            changes = {"arch": target.arch, "launch": record, "kernels": {"strategy": strategy}}
            with override(**changes, capabilities={"scratch": 0}):
                for grads in ("none", "hidden", "hidden,weight"):
                    for vocab in VOCABULARIES:
                        of_call = {"features": 64, "tokens": tokens, "vocab": vocab}
                        _run(torch.bfloat16, PLAIN, (), grads, None, **of_call)
                        if strategy == "fused" and grads != "none" and vocab != 50_257:
                            for share in (SMALL, LARGE):
                                _run(torch.bfloat16, PLAIN, (), grads, None, **of_call, share=share)
        found.append(made)
    return found


def launches(target: Target, dtypes: list[torch.dtype], replace: dict[str, int]) -> list[Launch]:
    """Every launch of every strategy, mode and dtype, plain and with all options; each once."""
    found: dict[Launch, None] = {}

    def record(module: str, name: str, _programs: int, warps: int, stages: int | None, arguments: dict[str, Any]):
        found[specialise(module, name, warps, stages, arguments)] = None
        stand_in(name, arguments, share=float(arguments.get("bound", 1.0) < SMALL))

    TritonTileOps.multiply = lambda self, out, a, b, add: out.zero_()
    for strategy in ("fused", "tiles"):  # every device takes the second for features that are no multiple of 16
        changes = {"strategy": strategy, "product": replace}
        with override(arch=target.arch, launch=record, kernels=changes, capabilities={"scratch": SCRATCH}):
            _every_call(strategy, dtypes)
    return list(found)


def _every_call(strategy: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        for options, outputs in ((PLAIN, ()), (CAPPED, OPTIONAL_OUTPUTS)):
            for grads in ("none", "hidden", "hidden,weight"):
                for budget in (None, 2**26):
                    _run(dtype, options, outputs, grads, budget)
            if options:
                _run(dtype, options, (), "hidden", None)
                _run(dtype, options, (), "hidden,weight", None)
            if strategy == "fused":
                _run(dtype, options, outputs, "hidden", None, features=272)
                _run(dtype, options, (), "hidden,weight", None, features=272)
                _run(dtype, options, outputs, "hidden,weight", 2**26, features=272)
                for share in (SMALL, LARGE):
                    for features in (256, 272):
                        for budget in (None, 2**26):  # with room to save exponentials, and without
                            _run(dtype, options, (), "hidden,weight", budget, features=features, share=share)


def _run(
    dtype: torch.dtype, options: dict, outputs: tuple, grads: str, budget: int | None, features: int = 256,
    tokens: int = 256, vocab: int = 64 * 1024, share: float | None = None,
) -> None:  # fmt: skip
    hidden, weight = torch.ones(tokens, features, dtype=dtype), torch.ones(vocab, features, dtype=dtype)
    bias = torch.zeros(vocab, dtype=dtype) if options else None
    labels = torch.zeros(tokens, dtype=torch.int64)
    hidden.requires_grad_("hidden" in grads)
    weight.requires_grad_("weight" in grads)
    of_head = {"gradient_filter": share, "memory_budget": budget, "impl": "triton"}
    made = token_stats(hidden, weight, labels, bias, outputs=outputs, **of_head, **options)
    if grads != "none":
        (made.log_probs if made.entropy is None else made.log_probs + made.entropy).sum().backward()
    else:
        labels[:9] = -100 if options else 0
        for width in (vocab // 4, vocab // 4 + 1):  # rows that start on 16 bytes, and not
            logits = torch.zeros(tokens, width, dtype=dtype, requires_grad=True)
            logits_to_log_probs(logits, labels, impl="triton", **options).sum().backward()


def inspect(target_name: str, launch: Launch) -> dict[str, Any]:
    """Compiles; registers, spills, shared memory, and the instructions that count."""
    target = TARGETS[target_name]
    row: dict[str, Any] = {"kernel": launch.kernel, "variant": launch.name, "target": target_name}
    try:
        made = compile_for(target, launch)
    except Exception as error:  # what the compiler refuses is a finding, not a crash
        return row | {"error": f"{type(error).__name__}: {error}"[-600:].replace("\n", " ")}
    row["shared"] = made.metadata.shared
    return row | (_read_cuda(made, target) if target.gpu.backend == "cuda" else _read_hip(made, target))


def _read_cuda(made: Any, target: Target) -> dict[str, Any]:
    usage, sass = disassembled(made)

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", sass))

    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return {
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", sass)), "serial": serial(sass),
        "registers": int(registers[1]), "spills": count("LDL[.A-Z0-9]*") + count("STL[.A-Z0-9]*"),
        "products": count(target.product + r"[.A-Z0-9_x]*"), "wide": count(r"LDG[.A-Z0-9]*\.128[.A-Z0-9]*"),
        "narrow": count(r"LDG[.A-Z0-9]*") - count(r"LDG[.A-Z0-9]*\.128[.A-Z0-9]*"),
    }  # fmt: skip


def serial(sass: str) -> str:
    """How products of warp groups (sm_90) wait where they need not; empty if they do not, or there are none."""
    products = re.findall(r"\bHGMMA[^;]*", sass)
    if len(products) > 1 and all("gsb0" in product for product in products):
        return "the compiler lets each product wait for the last"
    halves = any(re.search(r"\.(BF16|F16)\b", product.split()[0].rpartition(".F32")[2]) for product in products)
    if halves and not re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", sass):
        return "no product runs while the next operands come"
    return ""


def _read_hip(made: Any, target: Target) -> dict[str, Any]:
    text = made.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert registers is not None
    assert spilled is not None
    wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    return {
        "instructions": len(re.findall(r"^\t[a-z]\w+", text, re.MULTILINE)),
        "registers": int(registers[1]), "spills": int(spilled[1]) + text.count("scratch_"),
        "products": text.count(target.product), "wide": wide,
        "narrow": len(re.findall(r"(?:global|buffer)_load_", text)) - wide,
    }  # fmt: skip


# Known, of forward kernels: marks of logits with a bias and a cap, where smaller blocks would cost all calls with a
# cap; a register of 255, written and read once a tile; in kernels/hopper.py scalars, outside of products.
SPILLS = {
    ("forward_kernel", "gfx942", "biased,capped,mark"): 141, ("forward_kernel", "sm_80", "*bf16,save,one_base"): 2,
    ("hopper_forward_kernel", "sm_90", "*bf16,save,one_base"): 8,
}  # fmt: skip


def fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a compiled kernel, if anything."""
    if "error" in row:
        return row["error"]
    where = row["kernel"], row["target"]
    known = [most for (*at, what), most in SPILLS.items() if tuple(at) == where and what in row["variant"]]
    if row["spills"] > max(known, default=0):
        return f"{row['spills']} spills"
    if row["shared"] > TARGETS[row["target"]].shared:
        return f"{row['shared']:,} bytes of shared memory of {TARGETS[row['target']].shared:,}"
    if row["kernel"] in MULTIPLY and not row["products"]:
        return f"no {TARGETS[row['target']].product}"
    if row.get("serial"):
        return row["serial"]
    if row["kernel"] in ROWS and not row["wide"] and "odd rows" not in row["variant"]:
        return "no 16-byte loads"
    return None


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("instructions", "registers", "spills", "shared", "products", "wide", "narrow")
    lines = ["| kernel | variant | target | " + " | ".join(columns) + " | |", "|---" * 3 + "|---:" * 7 + "|---|"]
    for row in rows:
        cells = [row["kernel"], row["variant"], row["target"], *(str(row.get(c, "")) for c in columns)]
        lines.append(f"| {' | '.join(cells)} | {fault(row) or ''} |")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/generated/aot.md."""
    return f"""# The Triton kernels, compiled ahead of time

`python tests/aot.py --write docs/generated/aot.md` writes this page (`pytest -m aot` checks the same kernels): every
launch that the configurations can choose, by both strategies, by chip; triton {triton.__version__}. Instructions: all
of the code; shared memory in bytes; products: tensor-core instructions; wide and narrow: global loads of 16 bytes and
of fewer. The last column is empty where nothing is wrong. [The Triton kernels](../triton.md) says what the table
taught.

{table(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument("--replace", nargs="*", default=[], metavar="FIELD=NUMBER")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file for the table, in Markdown: docs/generated/aot.md")
    options = parser.parse_args()
    replace = {name: int(number) for name, number in (item.split("=") for item in options.replace)}
    jobs = [
        (name, launch)
        for name in options.targets
        for launch in launches(TARGETS[name], [getattr(torch, d) for d in options.dtypes], replace)
        if not options.kernels or launch.kernel in options.kernels
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(inspect, *zip(*jobs, strict=True)))
    rows.sort(key=lambda row: (row["kernel"], row["variant"], row["target"]))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.write:
        options.write.write_text(page(rows), encoding="utf-8")
    faults = [row for row in rows if fault(row)]
    print(f"\n{len(rows)} kernels compiled by triton {triton.__version__}, {len(faults)} of them with a fault")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
