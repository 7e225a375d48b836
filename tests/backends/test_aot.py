"""Ahead-of-time compilation of the Triton kernels for four chips; see aot.py. The default run takes one kernel of
one chip, `make thorough` all kernels of it, `pytest -m aot` all chips and dtypes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytest.importorskip("triton", reason="nothing to compile with: triton is not installed")


def compile_ahead(tmp_path: Path, *options: str) -> tuple[int, list[dict], str]:
    """The exit code of aot.py, a row for each kernel, and what it printed."""
    out = tmp_path / "aot.json"
    made = subprocess.run(
        [sys.executable, "tests/aot.py", "--json", str(out), *options], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert out.exists(), made.stderr[-2000:]
    return made.returncode, json.loads(out.read_text()), made.stdout


def test_a_kernel_of_one_chip(tmp_path):
    options = ("--targets", "sm_90", "--dtypes", "bfloat16", "--kernels", "forward_kernel")
    code, rows, printed = compile_ahead(tmp_path, *options)
    assert code == 0, printed
    assert {row["kernel"] for row in rows} == {"forward_kernel"}
    assert min(row["products"] for row in rows) > 0


@pytest.mark.slow
def test_every_kernel_of_one_chip(tmp_path):
    code, rows, printed = compile_ahead(tmp_path, "--targets", "sm_90", "--dtypes", "bfloat16")
    assert code == 0, printed
    kernels = {"forward_kernel", "recompute_kernel", "accumulate_kernel", "fold_kernel", "exps_kernel"}
    kernels |= {"gradient_kernel", "saved_kernel", "rebase_kernel", "sum_kernel", "mark_kernel", "count_kernel"}
    kernels |= {"gather_kernel", "pick_kernel", "key_kernel", "list_kernel", "known_kernel", "base_kernel"}
    kernels |= {"settle_kernel", "scale_kernel"}
    assert {row["kernel"] for row in rows} == kernels | {"merge_kernel", "finish_kernel", "jacobian_kernel"}
    products = [row["products"] for row in rows if row["kernel"] in ("forward_kernel", "recompute_kernel")]
    assert min(products) > 0


@pytest.mark.slow
def test_a_block_that_is_too_large_is_found(tmp_path):
    """The planted regression: blocks of 256 x 256 do not fit the registers."""
    options = ("--targets", "sm_90", "--dtypes", "bfloat16", "--kernels", "recompute_kernel")
    code, rows, printed = compile_ahead(tmp_path, *options, "--replace", "block_m=256", "block_n=256")
    assert code == 1
    assert all(row["spills"] for row in rows if "error" not in row)
    assert "spills" in printed.splitlines()[-3]


def test_no_number_of_tokens_compiles_a_kernel():
    """A CUDA graph may be captured with another one than its warm-up had."""
    code = (
        "from aot import TARGETS, of_each_count\n"
        "found = of_each_count(TARGETS['sm_90'], [1, 2, 7, 16, 129, 1000, 2048])\n"
        "for made in found[1:]: print(*(made ^ found[0]), sep='\\n', end='')\n"
        "print(len(found[0]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert made.stdout.strip().isdecimal(), made.stdout
    assert int(made.stdout) > 8


def test_products_that_wait_are_found():
    product, wait = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", "WARPGROUP.DEPBAR.LE gsb0, "
    code = "from aot import serial; import sys; print(repr([serial(sass) for sass in sys.argv[1:]]))"
    given = [
        f"{product} ;{product}, gsb0 ;{wait}0x1 ;{wait}0x0 ;",  # as they should
        f"{product}, gsb0 ;{wait}0x0 ;{product}, gsb0 ;{wait}0x0 ;",
        f"{product} ;{product}, gsb0 ;{wait}0x0 ;",
        f"{product} ;{product}, gsb0 ;{wait}0x0 ;".replace("BF16", "TF32"),  # are summed outside, one after the other
        "HMMA.16816.F32.BF16 R24, R1, R2, R24 ;",
    ]
    made = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=ROOT / "tests", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    each, none = "the compiler lets each product wait for the last", "no product runs while the next operands come"
    assert made.stdout.strip() == repr(["", each, none, "", ""])


@pytest.mark.slow
def test_a_loop_without_stages_is_found(tmp_path):
    """The planted regression: nothing is fetched ahead, so every product is waited for."""
    options = ("--targets", "sm_90", "--dtypes", "bfloat16", "--kernels", "recompute_kernel")
    code, _, printed = compile_ahead(tmp_path, *options, "--replace", "stages=1")
    assert code == 1
    assert "no product runs while the next operands come" in printed


@pytest.mark.slow
def test_specialised_warps_compile_for_hopper(tmp_path):
    """In Gluon, plain calls alone: 64 x 256 of four warps each, by shared slices."""
    options = ("--targets", "sm_90", "--dtypes", "bfloat16", "float16", "--kernels", "hopper_forward_kernel")
    code, rows, printed = compile_ahead(tmp_path, *options, "--replace", "specialized=1")
    assert code == 0, printed
    assert len({row["variant"] for row in rows}) == 5  # score and save of both, and one base a row of bfloat16
    assert {row["products"] for row in rows} == {8}


@pytest.mark.slow
def test_specialised_warps_compile(tmp_path):
    """A plain forward on Blackwell whose products have warps of their own; float32 and statistics do without."""
    options = ("--targets", "sm_100", "--kernels", "forward_kernel", "--replace", "specialized=1")
    code, rows, printed = compile_ahead(tmp_path, *options)
    assert code == 0, printed
    specialised = {row["variant"] for row in rows if "specialized" in row["variant"]}
    assert len(specialised) >= 8
    assert not any("outputs" in variant or "fp32[" in variant for variant in specialised)
    assert min(row["products"] for row in rows) > 0


@pytest.mark.aot
def test_every_kernel_of_every_chip(tmp_path, capsys):
    code, rows, printed = compile_ahead(tmp_path)
    with capsys.disabled():
        print("\n" + printed)
    assert code == 0
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
