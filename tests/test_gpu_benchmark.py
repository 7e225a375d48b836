"""`benchmarks.gpu` without a GPU: it runs in Triton's interpreter, writes what it should, and times nothing wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dpo_kernels.plan import FACTS

from benchmarks import gpu, report
from benchmarks.gpu_cases import Way, contests, tiny_contests
from benchmarks.peers import PEERS, Peer

CPU = torch.device("cpu")
JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="right"/>
<testcase classname="a" name="wrong"><failure message="assert 1 == 2"/></testcase>
<testcase classname="a" name="absent"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_it_runs_here_and_writes_every_field(tmp_path):
    junit, file = tmp_path / "tests.xml", tmp_path / "gpu.json"
    junit.write_text(JUNIT)
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--try", "--json", str(file), "--tests", str(junit), "1",
         "--only", "tiny-full", "logits-full", "tiles"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    content = json.loads(file.read_text())
    told = content["gpu"]
    assert told["finished"]
    assert told["failed"] == told["left_out"] == {}
    assert told["device"]["name"]
    assert told["tests"] == {
        "exit_status": 1, "passed": 1, "failed": {"a::wrong": "assert 1 == 2"}, "skipped": {"no GPU": ["a::absent"]}
    }  # fmt: skip
    run = content["dpo_kernels"]
    assert run["size"] == "tiny"
    assert run["date"]
    assert {"python", "torch", "triton"} <= run["versions"].keys()
    found = {(said["case"], said["peer"]): said for said in told["summary"]}
    assert {said["status"] for said in found.values()} == {"timed", "floor", "unavailable"}, found
    for mode, gemms in (("keep", 3), ("recompute", 4)):
        for path in ("fused", "tiles"):
            said = found["tiny-full", f"dpo_kernels {path}, {mode}"]
            assert said["ms"] > 0
            assert said["to_own_gemms"] == pytest.approx(said["to_floor"] * 3 / gemms)
            assert said["errors"].keys() == {"log_probs", "hidden", "weight"}
    assert found["tiny-full", "plain PyTorch"]["status"] == "timed"
    assert "needs a GPU" in found["tiny-full", "quack linear cross entropy"]["reason"]
    assert found["logits-full", "dpo_kernels"]["terabytes_per_second"] > 0
    assert {peer for case, peer in found if case == "tiles-score"} >= {"dpo_kernels tiles, 64 x 64", "bare GEMMs"}
    report.main([str(file), "--out", str(tmp_path)])
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "dpo_kernels fused, keep" in text


def half_the_gradient(inputs):
    return 0.5 * (right := PLAIN.adapters["hidden"](inputs)) + 0.5 * right.detach()


def raises(inputs):
    raise RuntimeError("no kernel for this chip")


def remembers(inputs, made=[]):  # noqa: B006  (that is how it cheats)
    made.append(PLAIN.adapters["hidden"](inputs))
    return made[0].detach() + 0 * (inputs.hidden.sum() + inputs.weight.sum() + made[-1].sum())


PLAIN = next(peer for peer in PEERS if peer.name == "plain PyTorch")
FULL = next(contest for contest in tiny_contests() if contest.case.name == "tiny-full")


def contestant(name, adapter):
    made = gpu._peer(PLAIN.name, FULL.case, CPU)
    made.row.peer = name
    return replace(made, peer=Peer(name, {"hidden": adapter}))


def test_what_is_wrong_is_reported_as_wrong_and_not_timed():
    field = [
        contestant("dpo_kernels, half the gradient", half_the_gradient), contestant("raises", raises),
        contestant("remembers", remembers), contestant("right", PLAIN.adapters["hidden"]),
    ]  # fmt: skip
    rows = {row.peer: row for row in gpu.measure_contest(FULL, CPU, gpu.Clock(60), 0.0, field)}
    wrong = gpu.summary(rows["dpo_kernels, half the gradient"])
    assert wrong["status"] == "wrong"
    assert "error of hidden" in wrong["reason"]
    assert "error of weight" in wrong["reason"]
    assert "ms" not in wrong
    assert "WRONG" in gpu.line(wrong)
    assert (rows["raises"].status, rows["raises"].reason) == ("failed", "RuntimeError: no kernel for this chip")
    assert rows["remembers"].status == "wrong"
    assert rows["remembers"].seconds is None
    assert rows["right"].status == "timed"


def test_when_time_is_up_the_rest_is_named(tmp_path):
    file = tmp_path / "gpu.json"
    todo = [replace(contest, needs=1.0) for contest in tiny_contests()[:2]]
    gpu.measure_all(todo, gpu.Report(file, "tiny", CPU, None), gpu.Clock(0), 0.0)
    told = json.loads(file.read_text())["gpu"]
    assert list(told["left_out"]) == ["tiny-score", "tiny-frozen"]
    late = gpu.measure_contest(FULL, CPU, gpu.Clock(-1), 0.0)
    assert {row.reason for row in late if row.peer.startswith("dpo_kernels")} == {"left out: time was up"}


def test_a_contest_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "make_inputs", lambda *_: raises(None))
    written = gpu.Report(tmp_path / "gpu.json", "tiny", CPU, gpu.test_outcomes(tmp_path / "absent.xml", 4))
    gpu.measure_all([FULL], written, gpu.Clock(60), 0.0)
    told = json.loads((tmp_path / "gpu.json").read_text())["gpu"]
    assert told["failed"]["tiny-full"].startswith("RuntimeError: no kernel for this chip")
    assert "no outcomes" in told["tests"]["error"]


def test_a_way_is_planted_and_taken_out_again():
    before = (dict(tables.PATHS), dict(tables.PRODUCTS), dict(tables.ROWS), dict(FACTS))
    way = Way("all", "tiles", product={"group": 5}, rows={"columns": 32}, tile=(17, 19))
    arch = tables.Arch("interpreted", 0)
    with way.planted(CPU, torch.bfloat16):
        assert tables.path(arch, 9, 64) == "tiles"
        assert tables.product(arch, torch.bfloat16, options=False).group == 5
        assert tables.product(arch, torch.float32, options=False).group != 5
        assert tables.ROWS["interpreted"].columns == 32
        assert FACTS["triton, interpreted"].tiles[0] == (17, 19)
    assert before == (tables.PATHS, tables.PRODUCTS, tables.ROWS, FACTS)


@pytest.mark.parametrize("contest", contests() + tiny_contests(), ids=lambda c: c.case.name)
def test_every_contest_is_well_formed(contest):
    assert contest.case.tokens % contest.case.sequences == 0
    assert set(contest.peers) <= {peer.name for peer in PEERS if contest.case.level in peer.adapters}
    assert len({way.peer for way in contest.ways}) == len(contest.ways)
