"""benchmarks.machine_code: what a tile costs, read from machine code; and the cycle model that is made of it."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.machine_code import PRODUCT, Tile, cycles, parse, tile_of

BRANCH = 70  # instructions that few tiles need


def assembled(*lines: str) -> str:
    """As cuobjdump prints them: an address every 16 bytes, and the encoding behind each, with a line of its own."""
    return "\n".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x000000000000790f */\n   /* 0x000fe20000000f00 */"
        for i, line in enumerate(lines)
    )


def kernel() -> str:
    """A loop over tiles (from 1) around one over features (3 to 6), then a branch that most tiles jump over."""
    behind = 8 + BRANCH
    return assembled(
        "MOV R1, c[0x0][0x28]",
        "S2R R0, SR_TID.X",
        "CS2R R24, SRZ",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR18+0x24000], R15",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        f"@!P5 BRA 0x{16 * 3:x}",
        f"@!P6 BRA P5, 0x{16 * behind:x}",
        *["FSEL R24, R24, -INF , !P0"] * BRANCH,
        "MUFU.EX2 R3, R24",
        "FADD R4, R3, R4",
        "@P1 FADD R5, R3, R5",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        f"@!P4 BRA 0x{16:x}",
        "EXIT",
        f"BRA 0x{16 * (behind + 6):x}",
    )


def test_what_is_done_once_a_tile_in_few_and_in_a_step():
    tile = tile_of(kernel())
    assert tile.products == 1
    assert tile.step == Counter({"other": 4})
    assert tile.rare == Counter({"alu": BRANCH})
    assert tile.once == Counter({"other": 5, "mufu": 1, "fma": 2})
    assert tile.barriers == 1


def test_a_kernel_of_one_tile_has_no_loop_around_its_products():
    code = assembled("MOV R1, R2", "HMMA.16816.F32.BF16 R4, R8, R16, R4", "@P0 BRA 0x10", "FADD R4, R4, R5", "EXIT")
    assert tile_of(code).once == Counter({"alu": 1, "fma": 1, "other": 1})


def test_warps_that_specialise_have_a_loop_of_their_own():
    """The products' loop (1 to 2) is another warp's; what is done once a tile is the longest of the others (4 to 8)."""
    code = assembled(
        "MOV R1, R2", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", "@P0 BRA 0x10", "EXIT", "LDTM.x32 R4, tmem[UR4]",
        "@P1 BRA 0x80", "FADD R4, R4, R5", "MUFU.EX2 R5, R5", "@P0 BRA 0x40", "EXIT",
    )  # fmt: skip
    tile = tile_of(code, specialized=True)
    assert (tile.products, tile.step.total()) == (1, 2)
    assert tile.once == Counter({"memory": 1, "other": 2, "fma": 1, "mufu": 1})
    assert not tile.rare


def test_code_without_products_is_an_error():
    with pytest.raises(ValueError, match="no product on tensor cores in a loop"):
        tile_of(assembled("MOV R1, R2", "EXIT"))


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"fma": 100}, 100),  # issued one by one
        ({"alu": 100}, 200),  # half as many lanes
        ({"mufu": 10, "fma": 60}, 80),  # the busiest unit
        ({"mufu": 10, "fma": 90}, 100),  # or the scheduler
        ({}, 0),
    ],
)
def test_cycles_are_those_of_the_busiest(instructions, expected):
    assert cycles(Counter(instructions), warps=4) == expected
    assert cycles(Counter(instructions), warps=8) == 2 * expected


def test_guards_and_targets_are_read():
    jump = parse(assembled("@!P6 BRA P5, 0x5130"))[0]
    assert (jump.name, jump.guarded, jump.target) == ("BRA", True, 0x5130)
    assert not parse(assembled("BRA 0x10"))[0].guarded
    assert parse(assembled("@UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"))[0].name == "UTCHMMA"
    assert "UTC" in PRODUCT


def test_the_model_charges_what_is_done_once_a_tile_to_each_tile():
    triton = pytest.importorskip("triton")
    assert triton
    from benchmarks.predict import BARRIER, CHIPS, FILL, Compiled, idle, scheduled
    from dpo_kernels.kernels.configs import ProductBlocks
    from dpo_kernels.splits import Splits

    kernel_of = Compiled("", "", ProductBlocks(128, 256, 64, 16, 8, 3), tile_of(kernel()), 255, 0)
    every, product = kernel_of.cycles(CHIPS["sm_90"], 4096)
    assert product == 64 * 1024
    assert every == product + 2 * 8 + FILL + BARRIER
    shares = [kernel_of.share(CHIPS["sm_90"], features) for features in (1024, 2048, 4096)]
    assert shares == sorted(shares)
    splits = Splits(128, 256, 4, 8192)
    assert scheduled(splits, 256, 1024, 512) == pytest.approx(2.05)  # four programs of two blocks
    assert idle(splits, 256, 1024, 512) == pytest.approx(1 - 2 / 2.05)


def test_times_are_predicted_of_every_case():
    """Of kernels that take no time beside their products: each case has the mode that its row says."""
    from benchmarks.predict import Compiled, published_table, times_table
    from dpo_kernels.kernels import configs

    blocks = configs.PRODUCTS[configs.Arch("cuda", 9), 2, "plain"]
    tile = Tile(Counter(), Counter(), Counter(), 4, 0)
    kernels = {
        purpose: Compiled("forward_kernel", purpose, blocks, tile, 255, 0)
        for purpose in ("score", "frozen", "keep", "logits again")
    }
    lines = times_table(kernels).splitlines()[2:]
    assert {line.split("|")[2].strip() for line in lines} == {"score", "frozen", "keep", "recompute"}
    assert len(published_table(kernels).splitlines()) > 5


def test_predict_says_what_it_takes(capsys):
    pytest.importorskip("triton")
    from benchmarks import predict

    for given, status in ((["--help"], 0), (["--features", "12"], 2)):
        with pytest.raises(SystemExit) as left:
            predict.main(given)
        assert left.value.code == status
    assert "predictions, not measurements" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "nowhere"], "nowhere is no model's folder"),
        (["--model", "."], "--data is None; --model takes tokens"),
    ],
)
def test_what_the_filter_s_benchmark_refuses(tmp_path, monkeypatch, capsys, given, words):
    from benchmarks import gradient_filter

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        gradient_filter.main(given)
    assert words in capsys.readouterr().err
