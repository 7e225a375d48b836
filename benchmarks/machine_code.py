"""What the machine code of a kernel does for a tile of a product: instructions by unit, and cycles of a multiprocessor.

A product's kernel is a loop over features, which tensor cores are busy with, in a loop over tiles, whose other
instructions they wait for: Triton's compiler lets no tile begin before the last is done. What a branch leaves out in
most tiles (the label's, the vocabulary's end) is counted apart. Cycles are the least that the units allow: each of four
schedulers issues an instruction a cycle, and a unit takes a warp's instruction for 32 threads over its lanes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

SCHEDULERS = 4
RARE = 64  # instructions that a branch jumps over at the least to be counted apart
# Cycles of a scheduler's unit for an instruction of a warp: 32 threads over its lanes.
UNITS = {
    "fma": (1, "FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2"),
    "imad": (2, "IMAD|HFMA2|HADD2|HMUL2|HMNMX2"),
    "alu": (
        2,
        "FSEL|FSETP|FMNMX|FMNMX3|ISETP|SEL|LOP3|IADD3|VIADD|VIMNMX|VIADDMNMX|SHF|PRMT|LEA|IABS|PLOP3|F2FP|MOV|P2R|R2P",
    ),
    "mufu": (8, "MUFU|I2F|F2I|F2F"),
    "memory": (4, r"SHFL|LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|LDL|STL|LDTM|STTM|LDC|LDT|STT"),
    "uniform": (2, r"U[A-Z0-9]+|R2UR|S2UR|VOTEU|ELECT"),
}
PRODUCT = r"HGMMA|UTC[A-Z]*MMA|HMMA"


class Instruction(NamedTuple):
    """target: the address that a branch goes to."""

    address: int
    guarded: bool
    name: str
    target: int | None


class Tile(NamedTuple):
    """Instructions of a warp, by unit: once a tile, and those in branches that few tiles take; then in a step of the
    loop over features. products: of tensor cores in a step. barriers, of a tile: where warps wait for each other."""

    once: Counter[str]
    rare: Counter[str]
    step: Counter[str]
    products: int
    barriers: int

    def cycles(self, warps: int) -> float:
        """Of a scheduler that has its part of so many warps, for what is done once a tile."""
        return cycles(self.once, warps)


def cycles(instructions: Counter[str], warps: int) -> float:
    busiest = max((count * _of_unit(unit) for unit, count in instructions.items()), default=0)
    return max(instructions.total(), busiest) * warps / SCHEDULERS


def _of_unit(unit: str) -> int:
    return UNITS[unit][0] if unit in UNITS else 1


def parse(code: str) -> list[Instruction]:
    """Of cuobjdump's --dump-sass."""
    found = []
    for line in code.split("\n"):
        match = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", line)
        if match:
            address, guard, name, rest = match.groups()
            jumps = re.search(r"\b0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None
            conditional = guard is not None or "P" in rest.split("0x")[0]
            found.append(Instruction(int(address, 16), conditional, name, int(jumps[1], 16) if jumps else None))
    return found


def tile_of(code: str, specialized: bool = False) -> Tile:
    """specialized: warps of their own multiply; what is done once a tile is a loop of the others, all branches in it.

    Raises:
        ValueError: the code has no product on tensor cores in a loop.
    """
    instructions = parse(code)
    products = {i.address for i in instructions if re.fullmatch(PRODUCT, i.name)}
    loops = [(i.target, i.address) for i in instructions if i.target is not None and i.target <= i.address]
    inner = [loop for loop in loops if any(_within(a, loop) for a in products)]
    if not inner:
        raise ValueError("the code has no product on tensor cores in a loop")
    step = min(inner, key=lambda loop: loop[1] - loop[0])
    around = [loop for loop in inner if loop[0] < step[0] and step[1] < loop[1]]
    if specialized:
        lengths = [loop for loop in loops if not any(_within(a, loop) for a in products)]
        around = [max(lengths, key=lambda loop: loop[1] - loop[0])]
    last = max(i.address for i in instructions if i.name == "EXIT")
    tile = min(around, key=lambda loop: loop[1] - loop[0]) if around else (0, last)
    jumps = [(i.address, i.target) for i in instructions if i.guarded and i.target and i.target > i.address]
    rare = [
        (start, end - 1)
        for start, end in jumps
        if _within(start, tile) and _within(end, tile) and end - start > 16 * RARE and not start < step[0] < end
        if not specialized
    ]
    once, few, each, barriers = Counter[str](), Counter[str](), Counter[str](), 0
    for i in instructions:
        if _within(i.address, step):
            each[_unit(i.name)] += 1
        elif _within(i.address, tile) and any(start < i.address <= end for start, end in rare):
            few[_unit(i.name)] += 1
        elif _within(i.address, tile):
            once[_unit(i.name)] += 1
            barriers += i.name == "BAR"
    return Tile(once, few, each, sum(_within(a, step) for a in products), barriers)


def _within(address: int, loop: tuple[int, int]) -> bool:
    return loop[0] <= address <= loop[1]


def _unit(name: str) -> str:
    return next((unit for unit, (_, names) in UNITS.items() if re.fullmatch(names, name)), "other")
