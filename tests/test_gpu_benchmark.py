"""`benchmarks.gpu` without a GPU: it runs in Triton's interpreter, writes what it should, and times nothing wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, report, results
from benchmarks.cases import GPU, MIB, TINY, Case
from benchmarks.configurations import Configuration
from benchmarks.measure import Effort, measure
from benchmarks.peers import PEERS, Peer
from benchmarks.verify import Problem, Truth
from dpo_kernels.backends import triton
from dpo_kernels.kernels import configs
from dpo_kernels.overrides import current

CPU = torch.device("cpu")
ONCE = Effort(0.0, 0.0)
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
    found = {(row.case.name, row.peer): row for row in results.load(file).rows}
    assert {row.status for row in found.values()} == {"timed", "floor", "unavailable"}, found
    for mode, gemms in (("keep", 3), ("recompute", 4)):
        for path in ("fused", "tiles"):
            row = found["tiny-full", f"dpo_kernels {path}, {mode}"]
            assert row.seconds > 0
            assert row.to_own_gemms == pytest.approx(row.to_floor * 3 / gemms)
            assert row.errors.keys() == {"log_probs", "hidden", "weight"}
    assert found["tiny-full", "plain PyTorch"].status == "timed"
    assert found["tiny-full", "a large copy"].moved == 2 * MIB
    assert "needs a GPU" in found["tiny-full", "quack linear cross entropy"].reason
    assert found["logits-full", "dpo_kernels triton"].moved == 3 * 64 * 320 * 2
    assert {peer for case, peer in found if case == "tiles-score"} >= {"dpo_kernels tiles, 64 x 64", "bare GEMMs"}
    report.main([str(file), "--out", str(tmp_path)])
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "dpo_kernels fused, keep" in text
    assert " GB/s | " in text


def half_the_gradient(inputs):
    return 0.5 * (right := PLAIN.adapters["hidden"](inputs)) + 0.5 * right.detach()


def raises(*_, **__):
    raise RuntimeError("no kernel for this chip")


def remembers(inputs, made=[]):  # noqa: B006  (that is how it cheats)
    made.append(PLAIN.adapters["hidden"](inputs))
    return made[0].detach() + 0 * (inputs.hidden.sum() + inputs.weight.sum() + made[-1].sum())


PLAIN = next(peer for peer in PEERS if peer.name == "plain PyTorch")
FULL = next(case for case in TINY if case.name == "tiny-full")


def test_what_is_wrong_is_reported_as_wrong_and_not_timed():
    peers = [
        Peer("dpo_kernels, half the gradient", {"hidden": half_the_gradient}), Peer("raises", {"hidden": raises}),
        Peer("remembers", {"hidden": remembers}), Peer("right", PLAIN.adapters),
    ]  # fmt: skip
    rows = {row.peer: row for row in measure(FULL, peers=peers, effort=ONCE)}
    wrong = rows["dpo_kernels, half the gradient"]
    assert wrong.status == "wrong"
    assert "error of hidden" in wrong.reason
    assert "error of weight" in wrong.reason
    assert wrong.seconds is None
    assert "WRONG" in report.table(rows.values())
    assert (rows["raises"].status, rows["raises"].reason) == ("failed", "RuntimeError: no kernel for this chip")
    assert rows["remembers"].status == "wrong"
    assert rows["remembers"].seconds is None
    assert rows["right"].status == "timed"


def test_when_time_is_up_the_rest_is_named(tmp_path):
    file, over = tmp_path / "gpu.json", replace(ONCE, end=-math.inf)
    gpu.measure_all([replace(case, needs=1.0) for case in TINY[:2]], gpu.Report(file, "tiny", CPU, None), over)
    told = json.loads(file.read_text())["gpu"]
    assert list(told["left_out"]) == ["tiny-score", "tiny-frozen"]
    late = measure(FULL, peers=[PLAIN], effort=over)
    assert {(row.status, row.reason) for row in late} == {("unavailable", "left out: time was up")}


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_a_part_of_the_tokens_is_verified(level):
    """The truth about a part is that about all, cut; what is wrong there alone is seen."""
    whole = Case("whole", level, "full", 24, 16, 97, "float32", sequences=4)
    problem = Problem(replace(whole, verified=8), CPU)
    outcome, all_of_it = problem.run(problem.step(PLAIN)), Truth.of(whole, problem.inputs).exact
    rows = problem.truth.rows
    assert rows.tolist() == list(range(0, 24, 3))
    torch.testing.assert_close(problem.truth.exact["log_probs"][0], all_of_it["log_probs"].flatten()[rows])
    assert problem.truth.check(outcome, ours=False)[1] == ""
    outcome["log_probs"].view(-1)[rows[3]] += 1
    assert "error of log_probs" in problem.truth.check(outcome, ours=False)[1]
    problem.forget()
    problem.change()
    assert problem.truth.rows.tolist() == list(range(1, 24, 3))
    assert problem.truth.check(problem.run(problem.step(PLAIN)), ours=False)[1] == ""


def test_what_is_right_but_comes_too_late_has_no_time():
    calls = []

    def slow(inputs):
        calls.append(1)
        time.sleep(0.5)
        return PLAIN.adapters["hidden"](inputs)

    rows = measure(FULL, peers=[Peer("slow", {"hidden": slow})], effort=Effort(0.0, 0.0, end=time.monotonic() + 0.4))
    slowly = next(row for row in rows if row.peer == "slow")
    assert (slowly.status, slowly.seconds, len(calls)) == ("unavailable", None, 1)


def test_a_case_that_breaks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.measure.problem_of", raises)
    written = gpu.Report(tmp_path / "gpu.json", "tiny", CPU, gpu.test_outcomes(tmp_path / "absent.xml", 4))
    gpu.measure_all([FULL], written, ONCE)
    told = json.loads((tmp_path / "gpu.json").read_text())["gpu"]
    assert told["failed"]["tiny-full"].startswith("RuntimeError: no kernel for this chip")
    assert "no outcomes" in told["tests"]["error"]


def test_a_configuration_is_applied_and_taken_back():
    before = current()
    configuration = Configuration("tiles", product={"group": 5}, rows={"block_n": 32}, tile=(17, 19))
    with configuration.applied(CPU):
        made = configs.resolve(configs.Arch("interpreted", 0), 64, torch.bfloat16, False, current().kernels)
        assert (made.strategy, made.product.group, made.rows.block_n) == ("tiles", 5, 32)
        tiles = current().capabilities["tiles"]
        assert tiles == ((17, 19), *triton.CAPABILITIES["interpreted"].tiles)
    assert current() == before


def test_a_new_peer_needs_no_other_file():
    """Every peer of a level takes part in a GPU's cases, but for those that are named as left out."""
    from benchmarks import peers

    case = next(case for case in GPU if case.name == "8k-152k-full")
    of_level = {peer.name for peer in PEERS if "hidden" in peer.adapters}
    assert {peer.name for peer in peers.peers_of(case)} == {*case.configurations, *(of_level - set(case.without))}
