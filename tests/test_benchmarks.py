"""The benchmarks themselves: what is wrong is never timed, every row is well-formed, and reports say what was found."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import report, results
from benchmarks.cases import IGNORE, MIB, REAL, SIZES, TRAINING, Case, make_inputs
from benchmarks.clock import ReplayClock
from benchmarks.measure import Judge, Row, by_rows, errors_of, interleave, measure, ratio, step
from benchmarks.peers import PEERS, Peer, dpo_from_log_probs, first_line, peers_of
from dpo_kernels import plan

TINY = Case("tiny", "hidden", "full", 24, 16, 97, "float32", masked=0.25, sequences=4, memory=False)
PLAIN = next(peer for peer in PEERS if peer.name == "plain PyTorch")


def measured(case, *peers):
    return {row.peer: row for row in measure(case, peers=peers, seconds=0.01)}


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


def test_a_peer_that_raises_or_is_not_installed_has_its_reason():
    def broken(inputs):
        raise RuntimeError("no driver in /some/folder/of/mine/driver.so\nmore")

    absent = Peer("absent", {"hidden": broken}, modules=("no_such_package.kernels",))
    rows = measured(TINY, Peer("broken", {"hidden": broken}), absent)
    assert rows["broken"].status == rows["absent"].status == "unavailable"
    assert rows["broken"].reason == "RuntimeError: no driver in driver.so"
    assert rows["absent"].reason == "not installed"


@pytest.mark.parametrize(
    ("level", "mode"),
    [(level, mode) for level in ("logits", "hidden", "dpo") for mode in ("score", "full")]
    + [("hidden", "frozen"), ("dpo", "frozen")],  # logits have no weight to freeze
)
def test_ours_and_plain_pytorch_are_right_at_every_level(level, mode):
    ours = next(peer for peer in PEERS if peer.name == "dpo_kernels torch")
    rows = measured(replace(TINY, level=level, mode=mode), ours, PLAIN)
    assert [row.status for row in rows.values()] == ["floor", "timed", "timed"], rows
    assert rows[ours.name].to_ours == 1.0
    assert rows[ours.name].to_floor > 0
    if level == "hidden":
        assert rows[ours.name].predicted_bytes > 0


def test_the_exact_answer_does_not_depend_on_its_blocks(monkeypatch):
    inputs = make_inputs(TINY)
    whole = by_rows(TINY, inputs, torch.float64)
    monkeypatch.setattr("benchmarks.cases.BLOCK_NUMBERS", 5 * TINY.vocab_size)
    counts = inputs.labels != IGNORE
    assert max(errors_of(by_rows(TINY, inputs, torch.float64), whole, counts).values()) < 1e-14
    plain = {"log_probs": PLAIN.adapters["hidden"](inputs).detach()} | {"hidden": whole["hidden"][:1]}
    errors = errors_of(plain, whole, counts)
    assert errors["log_probs"] < 1e-4
    assert errors["hidden"] == errors["weight"] == float("inf"), "a wrong shape and a missing gradient"


def test_tolerances_are_those_of_plain_pytorch():
    judge = Judge.of(TINY, make_inputs(TINY))
    errors, reason = judge.verdict(step(PLAIN.adapters["hidden"], TINY, make_inputs(TINY)))
    assert reason == ""
    assert all(0 < judge.allowed[name] < 1e-4 for name in errors)


@pytest.mark.parametrize("case", [c for size in SIZES.values() for c in size], ids=lambda c: c.name)
def test_every_row_is_well_formed(case):
    assert case.level in ("logits", "hidden", "dpo")
    assert case.mode in ("score", "full", "frozen")
    assert case.inputs in ("peaked", "noise")
    assert case.curve in (None, "tokens", "vocabulary", "budget")
    assert case.torch_dtype.is_floating_point
    assert case.sequences % 2 == 0
    assert case.tokens % case.sequences == 0
    assert 0 < case.counted_tokens <= case.tokens
    names = {peer.name for peer in PEERS}
    assert set(case.peers) | set(case.without) <= names
    assert peers_of(case)
    if case.level == "hidden":  # the budget is one that a plan exists for
        device = "cuda" if case in REAL else "cpu"
        made = plan(
            case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
            memory_budget=case.memory_budget, device=device,
        )  # fmt: skip
        assert made.bytes > 0


def test_names_are_unique_and_the_issue_is_covered():
    for cases in SIZES.values():
        assert len({case.name for case in cases}) == len(cases)
        assert {(c.level, c.mode) for c in cases} >= {
            ("logits", "score"), ("logits", "full"), ("hidden", "score"), ("hidden", "full"), ("hidden", "frozen"),
            ("dpo", "full"),
        }  # fmt: skip
        assert {c.masked for c in cases if c.level == "dpo"} == {0.3, 0.6, 0.9}
        assert {c.curve for c in cases} == {None, "tokens", "vocabulary", "budget"}
    assert max(c.tokens for c in REAL if c.curve == "tokens") == 131_072
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert TRAINING.keys() == SIZES.keys()


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

    rounds = interleave({"a": run("a", 0.1), "slow": run("slow", 10.0), "b": run("b", 0.2)}, 3.0, torch.device("cpu"))
    assert order[:3] == ["a", "slow", "b"]
    assert order.count("slow") == 1
    assert [set(times) for times in rounds[1:3]] == [{"a", "b"}] * 2
    assert order.count("a") > order.count("b") >= 3
    assert ratio(rounds, "b", "a") == pytest.approx(2.0)
    assert ratio(rounds, "a", "absent") is None


def test_the_clock_replays():
    clock = ReplayClock()
    clock.replay([0.25, 0.5])
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.25, 0.5]


def test_reasons_hold_no_paths():
    assert "/" not in first_line(OSError("cannot read /a/b-1.2/c_d/libx.so"))


def synthetic(ours=0.2, date="2030-01-02"):
    """A run of two cases and a budget curve, as a file would hold it."""
    head = replace(TINY, name="head", tokens=24)
    budget = [replace(TINY, name=f"budget-{m}", curve="budget", memory_budget=m * MIB) for m in (8, 16)]
    tokens = [replace(TINY, name=f"tokens-{n}", curve="tokens", tokens=n) for n in (24, 48, 96)]
    rows = [Row(asdict(head), "bare GEMMs", "floor", seconds=0.1, rounds=3, to_floor=1.0, to_ours=0.1 / ours)]
    errors = {"log_probs": 1e-6, "hidden": 1e-3, "weight": 2e-3}
    rows += [
        Row(asdict(head), "dpo_kernels torch", "timed", seconds=ours, rounds=3, to_floor=ours / 0.1, to_ours=1.0,
            bytes=30 * MIB, mode="keep", gemms=3.0, errors=errors),
        Row(asdict(head), "plain PyTorch", "timed", seconds=0.4, rounds=1, to_floor=4.0, to_ours=0.4 / ours,
            bytes_reason="too slow to run again", errors=errors, marks=["computes masked rows too"]),
        Row(asdict(head), "noise", "wrong", reason="error of log_probs 3.0e+00, allowed 1.0e-05"),
        Row(asdict(head), "absent", "unavailable", reason="not installed"),
    ]  # fmt: skip
    rows += [
        Row(asdict(case), "dpo_kernels torch", "timed", seconds=ours, rounds=3, to_floor=2.0, to_ours=1.0, mode=mode,
            gemms=gemms, bytes=(case.memory_budget or 9 * MIB) - 2 * MIB, returned_bytes=MIB,
            predicted_bytes=(case.memory_budget or 9 * MIB) - MIB, library_bytes=2 * MIB)
        for case, mode, gemms in zip(
            [*budget, *tokens], ["recompute", "keep"] * 2 + ["keep"], [4.0, 3.0, 3.0, 3.0, 3.0], strict=True
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
        "# Benchmarks: A CPU, 2 cores, 2030-01-02", "torch 2.13.0", "abc1234", "**dpo_kernels torch**", "200 ms",
        "30 MiB", "keep, 3 GEMMs", "1.0e-06", "2.0e-03", "**WRONG, not timed**", "noise: wrong: error of log_probs",
        "absent: unavailable: not installed (1 cases)", "1 round", "computes masked rows too",
        "| 8 MiB | dpo_kernels torch | recompute | 4.00 | 2.00 | 7.0 MiB | 5.0 MiB | -29% | 5.0 MiB | +0% |",
    ):  # fmt: skip
        assert part in text, part
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{name}-{kind}.png" for kind in ("cases", "tokens", "budget")}
    assert all(f"![{picture}]({picture})" in text for picture in pictures)
    kept = tmp_path / "out" / f"{name}.json"
    assert results.load(kept).to_json() == json.loads(json.dumps(synthetic().to_json()))
    assert "samples" not in kept.read_text()


def test_two_files_are_compared(tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    results.save(synthetic(), before)
    results.save(synthetic(ours=0.1, date="2030-01-03"), after)
    report.main([str(before), str(after), "--out", str(tmp_path)])
    text = (tmp_path / "a-cpu-2-cores-2030-01-03-compared.md").read_text()
    line = next(line for line in text.splitlines() if "head" in line and "dpo_kernels torch" in line)
    for part in ("200 ms", "100 ms", "2.00", "1.00", "-50%", "30 MiB"):
        assert part in line, line
    assert "noise" in text
    assert "absent" not in text


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="pytest benchmarks"):
        results.load(path)


def test_peers_above_log_probs_share_one_loss():
    case = replace(TINY, level="dpo")
    inputs = make_inputs(case)
    built = dpo_from_log_probs(PLAIN.adapters["hidden"])(inputs)
    assert abs(built.item() - by_rows(case, inputs, torch.float64)["loss"].item()) < 1e-5
