"""The threads of the C++ kernels: every task once, any number of callers, forks, errors, and OpenMP's binding."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT

from dpo_kernels import hidden_to_log_probs


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["alone", "crowded"], autouse=True)
def crowded(request):
    step(tokens=2)  # builds and loads the kernels
    torch.ops.dpo_kernels_cpp.set_crowded(request.param)
    yield request.param
    torch.ops.dpo_kernels_cpp.set_crowded(False)


def step(seed=0, tokens=130):
    """Log-probs and both gradients of a call that has work for several threads."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 32, generator=generator).requires_grad_()
    weight = torch.randn(1500, 32, generator=generator).requires_grad_()
    labels = torch.randint(1500, (tokens,), generator=generator)
    log_probs = hidden_to_log_probs(hidden, weight, labels, impl="cpp")
    log_probs.sum().backward()
    return torch.cat([log_probs.detach(), hidden.grad.flatten(), weight.grad.flatten()])


def run_tasks(count, fails=-1, ours=False):
    return torch.ops.dpo_kernels_cpp.run_tasks(count, fails, ours)


@pytest.fixture(params=[False, True], ids=["as kernels", "ours"])
def ours(request):
    return request.param


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_every_task_runs_once(threads, count, ours):
    for _ in range(50):
        assert run_tasks(count, ours=ours).tolist() == [1] * count


def test_an_error_of_a_task_reaches_the_caller_and_the_threads_go_on(threads, ours):
    for fails in (0, 1, 99):
        with pytest.raises(RuntimeError, match=f"task {fails} fails"):
            run_tasks(100, fails, ours)
        assert run_tasks(100, ours=ours).tolist() == [1] * 100


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_a_later_phase_waits_for_the_parts_that_it_needs(threads, count):
    for _ in range(50):
        assert torch.ops.dpo_kernels_cpp.run_phases(count, -1).tolist() == [1] * count


def test_nobody_waits_for_a_part_whose_thread_failed(threads):
    for fails in (0, 1, 99, 199, 200, 299):
        with pytest.raises(RuntimeError, match=f"task {fails} fails"):
            torch.ops.dpo_kernels_cpp.run_phases(100, fails)
        assert torch.ops.dpo_kernels_cpp.run_phases(100, -1).tolist() == [1] * 100


def test_callers_in_many_threads_do_not_disturb_each_other(threads):
    alone = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(step, range(4)))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_number_of_threads_may_change_between_calls(ours):
    before = torch.get_num_threads()
    try:
        for number in (1, 8, 2, 5, 1, 3):
            torch.set_num_threads(number)
            assert run_tasks(200, ours=ours).tolist() == [1] * 200
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_starts_threads_of_its_own(threads):
    """OpenMP's hang there, in any library that uses them."""
    assert run_tasks(100, ours=True).tolist() == [1] * 100
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: sys.exit(run_tasks_in_child()))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert run_tasks(100, ours=True).tolist() == [1] * 100


def run_tasks_in_child():
    return 0 if run_tasks(100, ours=True).tolist() == [1] * 100 else 1


def runs():
    return torch.ops.dpo_kernels_cpp.runs_on_own_threads()


def test_whose_threads_run(threads, crowded):
    """Ours where the cores are crowded, and as many as the threads."""
    before = runs()
    for _ in range(10):
        run_tasks(100)
    ours = runs() - before
    if threads == 1 or threads > len(os.sched_getaffinity(0)):
        assert ours == 0
    elif crowded:
        assert ours == 10
    else:
        assert ours < 10  # a wait may have been seen


@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores"])
@pytest.mark.parametrize("crowded", [True], indirect=True)
def test_where_openmp_binds_threads_to_cores_its_own_are_used(variable):
    code = """
import torch
from test_cpp_threads import run_tasks, runs, step
torch.set_num_threads(2)
step()
torch.ops.dpo_kernels_cpp.set_crowded(True)
assert run_tasks(64).tolist() == [1] * 64
print(runs())
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "backends")))
    environment = os.environ | {"PYTHONPATH": path} | dict([variable.split("=")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize("crowded", [True], indirect=True)
def test_fewer_cores_than_threads_are_seen_through_affinity(crowded):
    allowed = os.sched_getaffinity(0)
    before, torch_threads = runs(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert run_tasks(100).tolist() == [1] * 100
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(torch_threads)
    assert runs() == before


def crowd(*waits):
    return torch.ops.dpo_kernels_cpp.crowd(waits)


def test_a_wait_is_believed_for_some_kernels_and_longer_each_time_that_the_next_follows():
    assert crowd(*[0] * 50) == [0] * 50
    assert crowd(0, 1, *[0] * 40) == [0, 0, *[1] * 16, *[0] * 24]
    again = crowd(*[1] * 6000)  # whenever it is looked at
    lengths = [len(run) for run in "".join(map(str, again)).split("0") if run]
    assert lengths[:7] == [16, 32, 64, 128, 256, 512, 1024]
    assert max(lengths) == 1024
    calm = crowd(1, *[0] * 16, *[0] * 16, 1, *[0] * 40)  # as long a calm as was believed: noise again
    assert sum(calm) == 32
