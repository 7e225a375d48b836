"""What the benchmarks tell a person: a busy machine, a table of 100 columns, whole files, what a change did."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import ROOT

from benchmarks import busy, compare, long_context, results, screen
from benchmarks.busy import Machine, Reading
from benchmarks.cases import MIB, Case
from benchmarks.results import Results, Row

CASE = Case("head", "hidden", "full", 24, 16, 97, "float32", masked=0.25, sequences=4)


def timed(peer, seconds, rng, *, noise=0.02, rounds=5, case=CASE, floor=None, **fields):
    """A row as `fill_times` makes it, its rounds drawn around so many seconds."""
    samples = [seconds * rng.lognormvariate(0, noise) for _ in range(rounds)]
    first, middle, third = sorted(samples)[1], sorted(samples)[rounds // 2], sorted(samples)[-2]
    over = None if floor is None else middle / sorted(floor.samples)[rounds // 2]
    status = "floor" if floor is None else "timed"
    return Row(
        case, peer, status, seconds=middle, quartiles=[first, third], rounds=rounds, samples=samples, to_floor=over,
        **fields,
    )  # fmt: skip


def run_of(seed, slowdown=1.0, machine=1.0, **options):
    """A run of a floor, ours and a peer; slowdown: of ours alone, machine: of everything."""
    rng = random.Random(seed)
    floor = timed("bare GEMMs", 0.1 * machine, rng, **options)
    ours = timed("dpo_kernels", 0.12 * machine * slowdown, rng, floor=floor, **options)
    ours.errors, ours.allowed, ours.bytes = {"log_probs": 1e-6}, {"log_probs": 1e-5}, 30 * MIB
    peer = timed("plain PyTorch", 0.3 * machine, rng, floor=floor, **options)
    return Results("2030-01-02", "small", "A CPU, 2 cores", "2 threads", {}, "abc1234", [floor, ours, peer])


def verdicts(before, after):
    return {peer: told for _, peer, _, _, told in compare.compare(before, after)}


def test_a_planted_slowdown_of_a_fifth_is_found_and_noise_is_not():
    def found(**options):
        told = [verdicts(run_of(n, **options), run_of(n + 1000, 1.2, **options))["dpo_kernels"] for n in range(100)]
        return sum(t.said == "SLOWER" and t.worse for t in told)

    assert found(noise=0.01) == 100, "5 rounds"
    assert found(noise=0.03, rounds=15) > 95
    same = [t for n in range(300) for t in verdicts(run_of(n), run_of(n + 1000)).values()]
    assert not any(t.worse or t.said == "faster" for t in same), "900 rows without a change"
    assert {t.said for t in same} <= {"same", "too noisy to tell"}
    faster = verdicts(run_of(1, slowdown=1.2), run_of(2))["dpo_kernels"]
    assert (faster.said, faster.worse) == ("faster", False)
    assert -0.25 < faster.change < -0.1


def test_a_noisy_run_says_that_it_cannot_tell():
    told = [verdicts(run_of(n, noise=0.2), run_of(n + 1000, 1.2, noise=0.2))["dpo_kernels"] for n in range(50)]
    assert sum(t.said == "too noisy to tell" for t in told) > 45
    assert min(t.change + t.bound for t in told if t.said == "too noisy to tell") > 0.15, "20%, as logarithms add up"


def test_a_slower_machine_is_no_slower_code():
    told = verdicts(run_of(1), run_of(2, machine=1.5))
    assert told["dpo_kernels"].said == told["plain PyTorch"].said == "same"
    assert (told["bare GEMMs"].said, told["bare GEMMs"].worse) == ("slower machine", False), "the floor's own time"


def test_files_without_samples_are_compared_by_their_quartiles():
    runs = [run_of(1), run_of(2), run_of(3, slowdown=1.5)]
    for run in runs:
        for row in run.rows:
            row.samples = []
    assert verdicts(runs[0], runs[1])["dpo_kernels"].said == "same"
    assert verdicts(runs[0], runs[2])["dpo_kernels"].said == "SLOWER"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bytes": 80 * MIB}, "MORE MEMORY: 30 MiB, now 80 MiB"),
        ({"errors": {"log_probs": 9e-6}}, "LESS EXACT, log_probs: 1.0e-06, now 9.0e-06"),
        ({"status": "wrong", "reason": "error of log_probs", "seconds": None}, "WRONG now: error of log_probs"),
        ({"bytes": 31 * MIB}, None),
        ({"case": replace(CASE, tokens=48)}, None),
    ],
)
def test_what_else_gets_worse(change, said, tmp_path, capsys):
    before, after = run_of(1), run_of(2)
    after.rows[1] = replace(after.rows[1], **change)
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for run, path in zip((before, after), paths, strict=True):
        results.save(run, path, samples=True)
    assert compare.main([str(path) for path in paths]) == (said is not None)
    printed = capsys.readouterr().out
    if said is None:
        assert "Nothing of dpo_kernels is worse." in printed
    else:
        assert "- head, dpo_kernels: " in printed
        assert said in printed
    assert max(map(len, printed.splitlines()[:-1])) <= screen.WIDTH


def test_what_cannot_be_compared_ends_with_2(tmp_path, capsys):
    other, run, tiny = tmp_path / "other.json", tmp_path / "run.json", tmp_path / "tiny.json"
    other.write_text(json.dumps({"benchmarks": []}))
    results.save(run_of(1), run)
    results.save(replace(run_of(1), rows=[replace(run_of(1).rows[0], case=replace(CASE, name="tail"))]), tiny)
    assert compare.main([str(run), str(other)]) == 2
    assert "pytest benchmarks" in capsys.readouterr().err
    assert compare.main([str(run), str(tiny)]) == 2
    assert "no row is in both files" in capsys.readouterr().err
    assert compare.main([str(run), str(tmp_path / "none.json")]) == 2


def test_students_t_is_that_of_the_tables():
    for freedom, quantile in ((8, 5.041), (18, 3.922), (28, 3.674)):
        assert compare.students_t(0.9995, freedom) == pytest.approx(quantile, rel=0.01)


def test_missing_cores_are_what_others_keep_busy_beyond_what_is_idle():
    before = Reading(wall=0.0, own=0.0, busy=10.0, cpus=2)
    after = Reading(wall=2.0, own=3.0, busy=14.0, cpus=2)  # others: half a core
    assert busy.missing(before, after, threads=2) == pytest.approx(0.5)
    assert busy.missing(before, after, threads=1) == 0, "the other core is free for them"
    assert busy.missing(before, replace(after, own=4.0), threads=2) == 0
    assert busy.missing(None, after, threads=2) is None
    assert busy.missing(before, before, threads=2) is None
    assert busy.said(0.5).startswith("BUSY MACHINE: other processes take 0.5 of")
    assert "a product takes 2.0 x what it took before" in busy.said(0.0, slower=2.0)
    assert busy.said(0.1, slower=1.1) == busy.said(None) == ""


@pytest.mark.skipif(not busy.STAT.exists(), reason="the counters are Linux's")
def test_a_busy_machine_is_noticed():
    cores = busy.read().cpus
    neighbours = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(cores)]
    try:
        threads, machine = torch.get_num_threads(), Machine()
        torch.set_num_threads(cores)
        time.sleep(0.1)
        assert "BUSY MACHINE: other processes take" in machine.warning()
    finally:
        torch.set_num_threads(threads)
        for process in neighbours:
            process.kill()
            process.wait()


def test_a_case_is_shown_within_the_screen_and_in_a_sentence():
    rows = run_of(1).rows
    for row in rows:
        row.to_ours = row.seconds / rows[1].seconds
    rows += [
        Row(CASE, "a peer " + "of a long name" * 4, "wrong", reason="error of log_probs 3.0e+00, allowed 1.0e-05 " * 4),
        Row(CASE, "absent", "unavailable", reason="not installed"),
    ]
    table = screen.case_table(rows)
    assert max(map(len, table.splitlines())) <= screen.WIDTH
    assert table.splitlines()[1].startswith("bare GEMMs")
    assert "absent" not in table
    assert all(part in table for part in ("WRONG: error of log_probs", "30 MiB", "1e-06"))
    assert screen.verdict(rows).startswith("ours is the fastest, 1.17 x the bare work")
    assert "plain PyTorch, takes 2." in screen.verdict(rows)
    assert "unavailable: not installed: absent" in screen.summary(rows)
    assert not screen.busy_warning(rows)
    rows[1].missing_cores = 0.9
    assert "BUSY MACHINE in 1 of 1 cases: head" in screen.summary(rows)
    slower = [replace(row, to_ours=0.8, samples=[0.8 * s for s in rows[1].samples]) for row in rows[2:3]]
    assert "ours is BEHIND" in screen.verdict([*rows[:2], *slower])
    around = [sample * factor for sample, factor in zip(rows[1].samples, (0.9, 0.95, 1, 1.05, 1.1), strict=True)]
    assert "equally fast" in screen.verdict([*rows[:2], replace(rows[2], to_ours=1.01, samples=around)])


def test_time_left_and_folding():
    assert screen.left(100.0, 0, 10) == screen.left(100.0, 10, 10) == ""
    assert screen.left(60.0, 6, 10) == ", about 40 s left"
    assert screen.left(600.0, 5, 10) == ", about 10 min left"
    assert screen.fold("a bc def", 4) == ["a bc", "def"]
    assert screen.fold("x" * 9, 4) == ["xxxx", "xxxx", "x"]
    assert screen.fold("", 4) == [""]


def test_a_file_is_whole_when_its_writer_is_killed(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.save(run_of(1), path, samples=True)
    assert results.load(path).rows[1].samples == run_of(1).rows[1].samples
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.save(run_of(2), path)
    assert results.load(path).rows[1].samples == run_of(1).rows[1].samples


def test_a_long_pair_under_a_limit():
    """Who passed it, who ran the step again with less, and what the page says of the figures that were measured."""
    rows = [
        long_context.Row("plain", 64, None),
        long_context.Row("ours", 64, 3 * 2**20, 2.0, lowered="--gradient_checkpointing true"),
        long_context.Row("ours, --fit", 64, 2**20, 4.0, "--mlp_tiles auto", 2**20),
    ]
    assert long_context.table(rows).splitlines()[2] == (
        "| 2 x 64 | > 16 GiB | 3 MiB, 2 s, run again with `--gradient_checkpointing true` | 1 MiB, 4 s | "
        "`--mlp_tiles auto` |"
    )
    page = [_cells(line) for line in (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines()]
    of_file = long_context.table(long_context._load(ROOT / "docs/long_context.json")).splitlines()[2:]
    assert len(of_file) == 5
    assert all(_cells(line) in page for line in of_file)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
