"""The benchmarks themselves: what is wrong is never timed, every row is well-formed, and reports say what was found."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import growth, readme, report, results
from benchmarks.cases import CPU, MIB, REAL, SIZES, SMALL, Case
from benchmarks.floors import make_floor
from benchmarks.inputs import IGNORE, make_inputs
from benchmarks.measure import Effort, interleave, measure, ratio
from benchmarks.memory import Held
from benchmarks.peers import CONFIGURED, PEERS, Peer, peers_of
from benchmarks.results import Row
from benchmarks.verify import PROMISED, Problem, answer, errors_of
from dpo_kernels import plan, reference

ROOT = Path(__file__).parents[1]
# pytest-benchmark measures nothing in a process that seems to be one of several.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
TINY = Case("tiny", "hidden", "full", 24, 16, 97, "float32", masked=0.25, sequences=4, memory_of=())
TINY_DPO = replace(TINY, level="dpo", tokens=64, hidden_size=32, dtype="bfloat16")
PLAIN = next(peer for peer in PEERS if peer.name == "plain PyTorch")
OURS = PEERS[0]


def measured(case, *peers):
    return {row.peer: row for row in measure(case, peers=peers, effort=Effort(0.01))}


@pytest.mark.parametrize("level", ["hidden", "dpo"])
def test_noise_is_reported_as_wrong_and_not_timed(level):
    calls = []

    def noise(inputs):
        calls.append(1)
        log_probs = torch.randn(inputs.labels.shape) * (1 + 0 * (inputs.hidden.sum() + inputs.weight.sum()))
        return log_probs if level == "hidden" else log_probs.mean()

    rows = measured(replace(TINY, level=level), Peer("noise", {level: noise}), PLAIN)
    wrong = rows["noise"]
    assert wrong.status == "wrong"
    assert "allowed" in wrong.reason
    assert wrong.seconds is None
    assert not wrong.samples
    assert len(calls) == 1, "a wrong result must not be run again to be timed"
    assert rows["plain PyTorch"].status == "timed"


def wrong_gradient(inputs):
    """Right values, but half of the tokens' gradients are lost."""
    log_probs = PLAIN.adapters["hidden"](inputs)
    return torch.cat([log_probs[:2], log_probs[2:].detach()])


def no_weight_gradient(inputs):
    return PLAIN.adapters["hidden"](replace(inputs, weight=inputs.weight.detach()))


def nan_in_one_row(inputs):
    log_probs = PLAIN.adapters["hidden"](inputs).clone()
    log_probs[-1, -1] = torch.nan
    return log_probs


def one_token_off(inputs):
    return PLAIN.adapters["hidden"](replace(inputs, labels=inputs.labels.roll(1, 0)))


@pytest.mark.parametrize("adapter", [wrong_gradient, no_weight_gradient, nan_in_one_row, one_token_off])
def test_what_is_only_partly_wrong_is_wrong(adapter):
    assert measured(TINY, Peer("partly", {"hidden": adapter}))["partly"].status == "wrong"


def log_ratio_only(inputs):
    """The policy is its own reference."""
    return PLAIN.adapters["dpo"](replace(inputs, ref_hidden=inputs.hidden.detach(), ref_weight=inputs.weight.detach()))


def no_reference(inputs):
    log_probs = PLAIN.adapters["hidden"](inputs)
    return reference.dpo_loss(torch.zeros_like(log_probs), log_probs, inputs.labels != IGNORE, 0.1)[0]


def reference_with_the_policys_head(inputs):
    return PLAIN.adapters["dpo"](replace(inputs, ref_weight=inputs.weight.detach()))


def log_two(inputs):
    return math.log(2) + 0 * (inputs.hidden.sum() + inputs.weight.sum())


@pytest.mark.parametrize("adapter", [log_ratio_only, no_reference, reference_with_the_policys_head, log_two])
@pytest.mark.parametrize("masked", [0.25, 0.875])
def test_a_dpo_loss_without_the_reference_is_wrong(adapter, masked):
    case = replace(TINY_DPO, masked=masked)
    rows = measured(case, Peer("cheat", {"dpo": adapter}), PLAIN)
    assert rows["cheat"].status == "wrong"
    assert "error of loss" in rows["cheat"].reason, "gradients are wrong too, but the loss alone must show it"
    assert rows["plain PyTorch"].status == "timed"


@pytest.mark.parametrize("level", ["logits", "hidden", "dpo"])
def test_a_result_that_is_right_once_is_not_timed(level):
    right = PLAIN.adapters[level]
    kept = []

    def remembers(inputs):
        kept.append(right(inputs))
        if len(kept) == 1:
            return kept[0]
        leaf = inputs.hidden if inputs.logits is None else inputs.logits
        return kept[0].detach() + 0 * (leaf.sum() + inputs.weight.sum())

    def noise_later(inputs):
        log_probs = right(inputs)
        kept.append(log_probs)
        return log_probs if len(kept) == 1 else log_probs * torch.rand_like(log_probs)

    for adapter in (remembers, noise_later):
        kept.clear()
        row = measured(replace(TINY, level=level), Peer("once", {level: adapter}))["once"]
        assert len(kept) > 2, "it was right, and it was timed"
        assert row.status == "wrong"
        assert row.reason.startswith("after it was timed")
        assert row.seconds is row.to_floor is None
        assert not row.samples


def test_a_peer_that_changes_its_inputs_is_wrong_and_harms_nobody():
    def overwrites(inputs):
        log_probs = PLAIN.adapters["hidden"](inputs)
        inputs.hidden.data.zero_()
        return log_probs

    rows = measured(TINY, Peer("overwrites", {"hidden": overwrites}), PLAIN)
    assert rows["overwrites"].status == "wrong"
    assert rows["overwrites"].reason == "it changes its inputs"
    assert rows["plain PyTorch"].status == "timed"


def test_ours_is_held_to_what_it_promises():
    case = replace(TINY, dtype="bfloat16")
    off = lambda inputs: OURS.adapters["hidden"](inputs) + 2 * PROMISED[torch.bfloat16]  # noqa: E731
    rows = measured(case, Peer("dpo_kernels off", {"hidden": off}), Peer("a peer", {"hidden": off}))
    assert rows["dpo_kernels off"].status == "wrong"
    assert rows["a peer"].status == "timed"


def test_what_fails_is_no_loss_to_the_others(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no driver in /some/folder/of/mine/driver.so\nmore")

    calls = []

    def fails_later(inputs):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("full")
        return PLAIN.adapters["hidden"](inputs)

    monkeypatch.setattr("benchmarks.verify.make_floor", lambda name, case, inputs: broken(inputs))
    absent = Peer("absent", {"hidden": broken}, modules=("no_such_package.kernels",))
    gpu = Peer("gpu", {"hidden": broken}, needs_cuda=True)
    later = Peer("later", {"hidden": fails_later})
    rows = measured(TINY, Peer("broken", {"hidden": broken}), absent, gpu, later, PLAIN)
    reasons = {name: (row.status, row.reason) for name, row in rows.items()}
    assert reasons == {
        "bare GEMMs": ("failed", "RuntimeError: no driver in driver.so"),
        "broken": ("failed", "RuntimeError: no driver in driver.so"),
        "absent": ("unavailable", "no_such_package is not installed"),
        "gpu": ("unavailable", "needs a GPU (its kernels are Triton's or CuTe's)"),
        "later": ("failed", "while it was timed: MemoryError: full"),
        "plain PyTorch": ("timed", ""),
    }
    assert rows["plain PyTorch"].to_floor is None


@pytest.mark.slow
def test_memory_is_measured_or_a_reason_given():
    case = replace(TINY, vocab_size=20_000, memory_of=None, memory_budget=64 * MIB)
    rows = measured(case, OURS, Peer("unknown", PLAIN.adapters))
    ours = rows["dpo_kernels"]
    assert 20_000 * 16 * 4 < ours.returned_bytes < min(ours.first_bytes, ours.bytes)
    assert rows["unknown"].bytes is None
    assert rows["unknown"].bytes_reason.startswith("LookupError: unknown is none of PEERS")
    assert measured(TINY, PLAIN)["plain PyTorch"].bytes_reason == "not measured in this case"


def test_more_than_the_budget_is_wrong(monkeypatch):
    held = [Held(65 * MIB, MIB // 2), Held(10 * MIB, MIB // 2)]
    monkeypatch.setattr("benchmarks.measure.in_a_process", lambda *arguments: (held, ""))
    ours = measured(replace(TINY, memory_of=None, memory_budget=64 * MIB), OURS)["dpo_kernels"]
    assert ours.status == "wrong"
    assert ours.reason == "its first step holds 64.5 MiB, its budget is 64.0 MiB"


def test_of_a_shape_that_is_too_large_memory_alone_is_measured():
    (row,) = measure(replace(TINY, memory_of=None, timed=False, peers=("dpo_kernels",)))
    assert row.status == "memory"
    assert row.seconds is row.bytes is None
    assert row.first_bytes > 0
    assert row.predicted_bytes > 0


def test_the_floor_multiplies_in_blocks(monkeypatch):
    monkeypatch.setattr("benchmarks.floors.FLOOR_ROWS", 5)
    inputs = make_inputs(TINY)
    multiply = make_floor("bare GEMMs", TINY, inputs)
    multiply()
    cells = dict(zip(multiply.__code__.co_freevars, multiply.__closure__, strict=True))
    hidden, weight = inputs.hidden.detach().flatten(0, 1)[: TINY.counted_tokens], inputs.weight.detach()
    z = hidden @ weight.T
    torch.testing.assert_close(cells["grad_hidden"].cell_contents, z @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cells["grad_weight"].cell_contents, z.T @ hidden, rtol=1e-4, atol=1e-3)


PEERS_ADDED = """
import torch
from dataclasses import replace
from benchmarks import cases, peers
from benchmarks.cases import Case

def noise(inputs):
    return torch.randn(inputs.labels.shape) * (1 + 0 * (inputs.hidden.sum() + inputs.weight.sum()))

def crash(inputs):
    raise TypeError("an argument too many")

cases.SMALL[:] = [Case("tiny", "hidden", "full", 24, 16, 97, "float32", sequences=4, memory_of=())]
known = [p for p in peers.PEERS if p.name in ("dpo_kernels", "plain PyTorch")]
peers.PEERS = (*known, *(
    peers.Peer(f"{whose} {what.__name__}", {"hidden": what})
    for whose in ("dpo_kernels", "a peer's") for what in (noise, crash)
))
"""


def test_added_peers_from_pytest_to_the_report(tmp_path):
    """Noise and a crash, as ours and as a peer's: what pytest, its summary and the report make of them."""
    (tmp_path / "added_peers.py").write_text(PEERS_ADDED)
    written = tmp_path / "results.json"
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/test_cases.py", "-p", "added_peers", "-rA", "--color=no",
         "--benchmark-json", str(written)],
        cwd=ROOT, env={**ALONE, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    for outcome, peer in (
        ("PASSED", "bare GEMMs"), ("PASSED", "dpo_kernels"), ("PASSED", "plain PyTorch"), ("XFAIL", "a peer's noise"),
        ("FAILED", "dpo_kernels noise"), ("FAILED", "dpo_kernels crash"),
    ):  # fmt: skip
        assert f"{outcome} benchmarks/test_cases.py::test_case[tiny/{peer}]" in run.stdout, run.stdout
    for line in (
        "1 skipped", "a peer's crash is failed: TypeError: an argument too many", "[1/1] tiny: 24 x 16 x 97, float32",
        "a peer's noise", "WRONG: error of log_probs", f"results: {written}",
        "dpo_kernels noise is WRONG; dpo_kernels crash is FAILED",
        "failed: TypeError: an argument too many: a peer's crash",
    ):  # fmt: skip
        assert line in run.stdout, run.stdout
    of_ours, printed_tests = run.stdout.split("FAILURES", 1)
    assert max(map(len, of_ours.splitlines())) <= 100, "a screen's width"
    assert "Name (time in" not in printed_tests, "pytest-benchmark's own table"
    assert [path.name for path in tmp_path.iterdir() if "results" in path.name] == ["results.json"]
    medians = {f"tiny/{row.peer}": row.seconds for row in results.load(written).rows if row.seconds}
    replayed = {b["param"]: b["stats"]["median"] for b in json.loads(written.read_text())["benchmarks"]}
    assert replayed == pytest.approx(medians), "pytest-benchmark is given the interleaved times"
    report.main([str(written), "--out", str(tmp_path)])
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "| a peer's noise |  |  |  |  |  |  |  |" in text, "no number of a wrong result"
    assert "**WRONG, not timed**: error of log_probs" in text
    assert "- a peer's crash: failed: TypeError: an argument too many (1 cases)" in text


@pytest.mark.slow
def test_only_the_peers_asked_for_are_measured(tmp_path):
    written = tmp_path / "results.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-k", "logits-forward-bf16 and plain", "--benchmark-json",
         str(written)],
        cwd=ROOT, check=True, capture_output=True, env=ALONE,
    )  # fmt: skip
    rows = results.load(written).rows
    assert [row.peer for row in rows] == ["bare copy", "dpo_kernels", "dpo_kernels torch", "plain PyTorch"]


@pytest.mark.parametrize(
    ("level", "mode"),
    [(level, mode) for level in ("logits", "hidden", "dpo") for mode in ("score", "full")]
    + [("hidden", "frozen"), ("dpo", "frozen")],  # logits have no weight to freeze
)
def test_ours_and_plain_pytorch_are_right_at_every_level(level, mode):
    rows = measured(replace(TINY, level=level, mode=mode), OURS, PLAIN)
    assert [row.status for row in rows.values()] == ["floor", "timed", "timed"], rows
    ours = rows["dpo_kernels"]
    assert ours.to_ours == 1.0
    assert ours.to_floor > 0
    assert ours.marks[0].startswith("impl ")
    if level == "hidden":
        assert ours.predicted_bytes > 0
    if level != "logits":
        assert ours.gemms == rows["bare GEMMs"].gemms, "nothing is recomputed at this size"


def test_the_exact_answer_does_not_depend_on_its_blocks(monkeypatch):
    inputs = make_inputs(TINY)
    whole = answer(TINY, inputs, torch.float64).outcome
    monkeypatch.setattr("benchmarks.inputs.BLOCK_NUMBERS", 5 * TINY.vocab_size)
    counts = inputs.labels != IGNORE
    assert max(errors_of(answer(TINY, inputs, torch.float64).outcome, whole, counts).values()) < 1e-14
    plain = {"log_probs": PLAIN.adapters["hidden"](inputs).detach()} | {"hidden": whole["hidden"][:1]}
    errors = errors_of(plain, whole, counts)
    assert errors["log_probs"] < 1e-4
    assert errors["hidden"] == errors["weight"] == float("inf"), "a wrong shape and a missing gradient"


def test_tolerances_are_those_of_plain_pytorch():
    problem = Problem(TINY, torch.device("cpu"))
    truth = problem.truth
    errors, reason = truth.check(problem.step(PLAIN)(), ours=False)
    assert reason == ""
    assert all(0 < truth.allowed[name] < 1e-4 for name in errors)
    assert truth.allowed_ours["log_probs"] == 1e-5
    assert all(truth.allowed_ours[name] < truth.allowed[name] for name in ("hidden", "weight"))


@pytest.mark.parametrize("case", [c for size in SIZES.values() for c in size], ids=lambda c: c.name)
def test_every_row_is_well_formed(case):
    assert case.level in ("logits", "hidden", "dpo", "train")
    assert case.mode in ("score", "full", "frozen")
    assert case.inputs in ("peaked", "noise")
    assert case.curve in (None, "tokens", "vocabulary", "budget")
    assert case.torch_dtype.is_floating_point
    assert case.sequences % 2 == 0
    assert case.sequences >= 4, "pairs that change places"
    assert case.tokens % case.sequences == 0
    assert 0 < case.counted_tokens <= case.tokens
    names = {peer.name for peer in PEERS}
    assert {*(case.peers or ()), *case.without, *(case.memory_of or ())} <= names
    configured = [peer.name for peer in CONFIGURED if peer.name in case.configurations]
    assert sorted(configured) == sorted(case.configurations)
    assert len({peer.name for peer in peers_of(case)}) == len(peers_of(case)) > 0
    if case.level == "hidden":  # the budget is one that a plan exists for
        device = "cuda" if case in REAL or case.configurations else "cpu"
        made = plan(
            case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
            memory_budget=case.memory_budget, device=device,
        )  # fmt: skip
        assert made.bytes > 0


def test_names_are_unique_and_the_issue_is_covered():
    assert all(len({case.name for case in cases}) == len(cases) for cases in SIZES.values())
    for cases in (SMALL, REAL):
        assert {(c.level, c.mode) for c in cases} >= {
            ("logits", "score"), ("logits", "full"), ("hidden", "score"), ("hidden", "full"), ("hidden", "frozen"),
            ("dpo", "full"),
        }  # fmt: skip
        assert {c.masked for c in cases if c.level == "dpo"} == {0.3, 0.6, 0.9}
        assert {c.curve for c in cases} == {None, "tokens", "vocabulary", "budget"}
    assert max(c.tokens for c in REAL if c.curve == "tokens") == 131_072
    assert all("train" in {c.level for c in cases} for cases in (SMALL, CPU, REAL))
    assert len({peer.name for peer in (*PEERS, *CONFIGURED)}) == len(PEERS) + len(CONFIGURED)


def test_inputs_are_peaked_and_masked():
    case = replace(TINY, tokens=512, hidden_size=64, vocab_size=1000)
    inputs = make_inputs(case)
    log_probs = PLAIN.adapters["hidden"](inputs)[inputs.labels != IGNORE]
    assert log_probs.exp().median() > 0.5
    assert (inputs.labels == IGNORE).float().mean() == 0.25
    assert (inputs.labels[:, :32] == IGNORE).all()
    assert (inputs.cotangent[inputs.labels == IGNORE] == 0).all()
    noise = make_inputs(replace(case, inputs="noise"))
    assert PLAIN.adapters["hidden"](noise)[noise.labels != IGNORE].exp().median() < 0.05


def test_rounds_are_interleaved_and_slow_ones_sit_out(monkeypatch):
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(name, seconds):
        def go():
            order.append(name)
            now[0] += seconds

        return go

    runs = {"a": run("a", 0.1), "slow": run("slow", 20.0), "b": run("b", 0.2)}
    rounds, failures = interleave(runs, Effort(3.0, 15.0), torch.device("cpu"))
    assert not failures
    assert order[:3] == ["a", "slow", "b"]
    assert order.count("slow") == 1
    assert [set(times) for times in rounds[1:3]] == [{"a", "b"}] * 2
    assert order.count("a") == order.count("b") == 5, "all play the same rounds"
    assert ratio(rounds, "b", "a") == pytest.approx(2.0)
    assert ratio(rounds, "a", "absent") is None


def synthetic(ours=0.2, date="2030-01-02"):
    """A run of a case and two curves, as a file would hold it."""
    head = replace(TINY, name="head", tokens=24)
    budget = [replace(TINY, name=f"budget-{m}", curve="budget", memory_budget=m * MIB) for m in (8, 16)]
    tokens = [replace(TINY, name=f"tokens-{n}", curve="tokens", tokens=n) for n in (24, 48, 96)]
    held = [case.memory_budget or 9 * MIB for case in budget + tokens]
    rows = [Row(head, "bare GEMMs", "floor", seconds=0.1, rounds=3, to_floor=1.0, to_ours=0.1 / ours)]
    errors = {"log_probs": 1e-6, "hidden": 1e-3, "weight": 2e-3}
    rows += [
        Row(head, "dpo_kernels", "timed", seconds=ours, rounds=5, to_floor=ours / 0.1, to_ours=1.0,
            quartiles=[0.95 * ours, 1.05 * ours], bytes=30 * MIB, mode="keep", gemms=3.0, errors=errors),
        Row(head, "plain PyTorch", "timed", seconds=0.4, rounds=1, to_floor=4.0, to_ours=0.4 / ours,
            bytes_reason="too slow to run again", errors=errors, marks=["computes masked rows too"]),
        Row(head, "noise", "wrong", reason="error of log_probs 3.0e+00, allowed 1.0e-05"),
        Row(head, "absent", "unavailable", reason="not installed"),
    ]  # fmt: skip
    rows += [
        Row(case, "dpo_kernels", "timed", seconds=ours, rounds=3, to_floor=2.0, to_ours=1.0, mode=mode,
            gemms=gemms, first_bytes=peak, bytes=peak - 2 * MIB, returned_bytes=MIB, predicted_bytes=peak - MIB,
            library_bytes=2 * MIB)
        for case, peak, mode, gemms in zip(
            budget + tokens, held, ["recompute", "keep"] * 2 + ["keep"], [4.0, 3.0, 3.0, 3.0, 3.0], strict=True
        )
    ]  # fmt: skip
    return results.Results(date, "small", "A CPU, 2 cores", "2 threads", {"torch": "2.13.0"}, "abc1234", rows)


def test_a_report_has_everything_and_its_pictures(tmp_path):
    source = tmp_path / "results.json"
    results.save(synthetic(), source)
    report.main([str(source), "--out", str(tmp_path / "out")])
    name = "a-cpu-2-cores-2030-01-02"
    text = (tmp_path / "out" / f"{name}.md").read_text()
    for part in (
        "# Benchmarks: A CPU, 2 cores, 2030-01-02", "torch 2.13.0", "abc1234", "**dpo_kernels**", "200 ms",
        "190 ms to 210 ms | 5 |", "| 2.00 | 1.00 | 0 GFLOP/s | 30 MiB |",
        "30 MiB", "keep, 3 GEMMs", "1.0e-06", "2.0e-03", "**WRONG, not timed**", "noise: wrong: error of log_probs",
        "absent: unavailable: not installed (1 cases)", "computes masked rows too",
        "[benchmarks/README.md](../README.md#how-to-read)",
        "| budget-8 | 8 MiB | recompute | 4.00 | 2.00 | 7.0 MiB | 7.0 MiB | +0% | 5.0 MiB | 5.0 MiB | +0% |",
    ):  # fmt: skip
        assert part in text, part
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{name}-{kind}.png" for kind in ("cases", "tokens", "budget")}
    assert all(f"![{picture}]({picture})" in text for picture in pictures)
    kept = tmp_path / "out" / f"{name}.json"
    assert results.load(kept).to_json() == json.loads(json.dumps(synthetic().to_json()))
    assert "samples" not in kept.read_text()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="pytest benchmarks"):
        results.load(path)


def test_growth_writes_points_table_and_picture(tmp_path, monkeypatch):
    small = {"tokens": (1, 4), "vocabulary": (50, 90)}
    for name, value in {"GROWING": small, "VOCAB": 64, "TOKENS": 4, "FEATURES": 16, "EFFORT": Effort(0.0)}.items():
        monkeypatch.setattr(growth, name, value)
    growth.main(["--out", str(tmp_path / "growth")])
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert len({(p["curve"], p["what"], p["threads"], p["tokens"], p["vocab_size"]) for p in points}) == 16
    assert all(p["ours"] > 0 < p["bare"] and p["rounds"] >= 4 for p in points)
    assert (tmp_path / "growth.md").read_text().count("| full step |") == 8
    assert (tmp_path / "growth.png").exists()


def test_the_picture_of_the_readme(tmp_path, monkeypatch):
    """Without processes: what is measured of them is another test's."""
    returned = 4 * (16 * 16 + 97 * 16 + 1)  # bytes of both gradients and the loss at 16 tokens
    marks = [Held(3 * MIB * n + returned, returned) for n in (1, 2)]
    monkeypatch.setattr(readme, "in_a_process", lambda steps, *_: (marks[:steps], ""))
    monkeypatch.setattr(readme, "LINES", readme.LINES[:4])
    path = tmp_path / "readme.json"
    with monkeypatch.context() as patch:
        patch.setattr(readme, "draw", lambda *_: None)
        readme.main(["--output", str(path), "--tokens", "16", "32", "--dtypes", "float32", "--hidden-size", "16",
                     "--vocab-size", "97"])  # fmt: skip
    rows = results.load(path).rows
    assert [(row.case.tokens, row.peer) for row in rows] == [(n, line.name) for n in (16, 32) for line in readme.LINES]
    assert all(row.status == "timed" and row.seconds for row in rows)
    assert all(row.errors for row in rows[:4]), "verified at the fewest tokens"
    assert [readme.held(row) for row in rows[3:5]] == [6 * MIB, 3 * MIB], "of the second step, of the first"
    readme.main(["--output", str(path), "--draw-only"])
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_picture_leaves_out_what_time_does_and_what_is_wrong(monkeypatch):
    monkeypatch.setattr(readme, "in_a_process", lambda *_: ([], "not now"))
    cases = [readme.case_of(replace(readme.BASE, hidden_size=16, vocab_size=97), "float32", n) for n in (16, 32)]
    monkeypatch.setattr(readme, "LINES", readme.LINES[:2])
    (rows, _) = readme.measured(cases, end=0.0)
    assert {(row.status, row.reason, row.bytes_reason) for row in rows} == {("unavailable",) + 2 * (readme.TIME_IS_UP,)}
    other = replace(PLAIN, adapters={"dpo": lambda i: PLAIN.adapters["dpo"](i) + 1})
    monkeypatch.setattr(readme, "PEERS", [other, OURS])
    rows = [Row(cases[1], line.name, "unavailable") for line in readme.LINES]
    readme.measure_time(rows, cases[1], rounds=1, verified=False, end=math.inf)
    assert [row.status for row in rows] == ["wrong", "timed"]
    assert rows[0].reason.startswith("its loss is")


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0, 50], [0, 50]),
        ([10, 10], [5, 15]),
        ([0, 100, 102, 104], [0, 92, 102, 112]),
        ([0, 8, 14], [-2.67, 7.33, 17.33]),
    ],
)
def test_names_in_the_picture_are_apart(wanted, placed):
    assert readme.apart(wanted, 10) == pytest.approx(placed, abs=0.01)
