"""What the just-in-time build promises: once, whole or not at all, and never in the way of what works without it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from helpers import ROOT, slow

from dpo_kernels import available_impls, build, dispatch, hidden_to_log_probs
from dpo_kernels.backends import cpp
from dpo_kernels.dispatch import BACKENDS

ANSWER = 'extern "C" int answer() { return 42; }\n'
CPU = torch.device("cpu")


@pytest.fixture
def csrc(tmp_path, monkeypatch) -> Iterator[Path]:
    """Sources that build in a moment, an empty cache, and a process that has not loaded the kernels."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cpp").write_text('#include "answer.h"\n')
    (folder / "answer.h").write_text(ANSWER)
    monkeypatch.setattr(build, "_loaded", None)  # these libraries are none of ours: several may be loaded
    monkeypatch.setattr(build, "INSTALLED", folder)
    monkeypatch.setenv("DPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DPO_KERNELS_CXXFLAGS", raising=False)
    monkeypatch.setattr(BACKENDS["cpp"], "failure", None)
    monkeypatch.setattr(cpp, "_loaded", lambda: False)
    dispatch._warn.cache_clear()
    yield folder
    dispatch._warn.cache_clear()


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def held(folder: Path) -> list[str]:
    """What a cache holds, by kind."""
    return sorted("build" if path.is_dir() else path.suffix for path in folder.iterdir())


def compiler(path: Path, body: str) -> str:
    """A C++ compiler that says its version, and otherwise does what the shell commands say."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "test compiler 1" && exit 0\n{body}\n')
    path.chmod(0o755)
    return str(path)


def script(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Python code as a process group of its own, whose output is caught."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    """Nothing of these processes outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_first_use_builds_and_says_one_line_and_later_ones_do_not_build(csrc, capfd):
    library = build.library()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("dpo_kernels: building the C++ kernels")
    assert err.endswith(f"s: {library}\n")
    assert answer(library) == 42
    assert held(library.parent) == [".lock", ".so"]
    written = library.stat().st_mtime_ns
    assert build.library() == library
    assert capfd.readouterr() == ("", "")
    assert library.stat().st_mtime_ns == written


def test_a_finished_library_needs_no_ninja_and_no_folder_that_can_be_written(csrc, monkeypatch):
    library = build.library()
    monkeypatch.setattr(build, "_ninja", lambda: pytest.fail("asked for ninja"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    assert build.library() == library
    assert build.missing() is None


def other_capability(patch, csrc):
    name = "AVX2" if build._capability() == "DEFAULT" else "DEFAULT"
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    assert f"dpo_kernels_{name.lower()}_" in build.cached_library().name
    assert f"-DCPU_CAPABILITY_{name}" in build.compile_flags()


CHANGES = {
    "a source": lambda patch, csrc: (csrc / "answer.cpp").write_text("// nothing\n"),
    "a header": lambda patch, csrc: (csrc / "answer.h").write_text(ANSWER + "\n"),
    "a name": lambda patch, csrc: (csrc / "answer.h").rename(csrc / "renamed.h"),
    "flags": lambda patch, csrc: patch.setattr(build, "FLAGS", build.FLAGS + " -g"),
    "flags of the user": lambda patch, csrc: patch.setenv("DPO_KERNELS_CXXFLAGS", "-O1"),
    "torch": lambda patch, csrc: patch.setattr(torch, "__version__", "2.99.0"),
    "torch's ABI": lambda patch, csrc: patch.setattr(torch, "compiled_with_cxx11_abi", lambda: False),
    "the compiler": lambda patch, csrc: patch.setenv("CXX", compiler(csrc.parent / "other", "exit 1")),
    "its version": lambda patch, csrc: patch.setattr(build, "_version", lambda command: "test compiler 2"),
    "the CPU": other_capability,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_holds_what_a_build_depends_on(change, csrc, monkeypatch):
    first = build.cached_library()
    (csrc / "answer.cpp.swp").write_text("no source")
    assert build.cached_library() == first
    CHANGES[change](monkeypatch, csrc)
    assert build.cached_library() != first


def test_what_torch_is_told_to_use_is_what_is_built():
    code = "from dpo_kernels import build; print(build.cached_library().name, *build.compile_flags())"
    out, err = script(code, ATEN_CPU_CAPABILITY="default").communicate(timeout=60)
    assert out.startswith("dpo_kernels_default_"), err
    assert "-mavx" not in out


def impossible(patch, csrc):
    (csrc.parent / "file").write_text("")
    patch.setenv("DPO_KERNELS_CACHE", str(csrc.parent / "file" / "cache"))


def no_ninja(patch, csrc):
    patch.setitem(sys.modules, "ninja", None)
    patch.setattr(shutil, "which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")


def no_home(patch, csrc):
    patch.delenv("DPO_KERNELS_CACHE")
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))


def no_path(patch, csrc):
    patch.delenv("CXX", raising=False)
    patch.setenv("PATH", str(csrc))


def broken_compiler(patch, csrc):
    patch.setenv("CXX", compiler(csrc.parent / "broken", 'echo "x.cpp:1:1: fatal error: no such thing" && exit 1'))


def no_sources(patch, csrc):
    shutil.rmtree(csrc)
    patch.setattr(build, "CHECKOUT", csrc)


def library_of_nothing(patch, csrc):
    path = build.cached_library()
    path.parent.mkdir()
    path.write_bytes(b"half a library")


# What goes wrong -> how, cause, remedy, whether it is known before a build is tried.
CAUSES = {
    "no compiler": (no_path, "no C.. compiler found", "install one .* or set CXX", True),
    "CXX does not exist": (
        lambda patch, csrc: patch.setenv("CXX", "nonexistent"), "'nonexistent' does not run", "set CXX", True,
    ),
    "CXX fails": (lambda patch, csrc: patch.setenv("CXX", "false"), "'false' does not run", "set CXX", True),
    "CXX cannot be parsed": (lambda patch, csrc: patch.setenv("CXX", "g++ '"), "does not run", "set CXX", True),
    "the compiler fails": (broken_compiler, "broken' failed", "set CXX.*\n.*: fatal error: no such thing", False),
    "an error in a source": (
        lambda patch, csrc: (csrc / "answer.h").write_text("int answer() { return x; }\n"),
        "failed; .*log has all", "error: .x. was not declared", False,
    ),
    "no ninja": (no_ninja, "ninja not found", "pip install ninja", True),
    "an impossible cache": (impossible, "cannot write .*Not a directory|file", "set DPO_KERNELS_CACHE", True),
    "no home": (no_home, "Could not determine home", "set DPO_KERNELS_CACHE", True),
    "no sources": (no_sources, "sources are not at", "install dpo-kernels again", True),
    "half a library": (library_of_nothing, "cannot load .*so", "delete it", False),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_what_cannot_be_built_is_said_once_and_torch_goes_on(name, csrc, monkeypatch, capsys):
    break_it, cause, remedy, known = CAUSES[name]
    break_it(monkeypatch, csrc)
    message = f"(?s){cause}.*{remedy}"
    assert (available_impls()["cpp"] is not None) == known
    hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    with pytest.warns(UserWarning, match=message) as warned:
        results = [hidden_to_log_probs(hidden, weight, labels) for _ in range(3)]
    assert len(warned) == 1
    assert "falls back to PyTorch" in str(warned[0].message)
    expected = hidden_to_log_probs(hidden, weight, labels, impl="torch")
    assert all(torch.equal(result, expected) for result in results)
    with pytest.raises(RuntimeError, match=message):
        hidden_to_log_probs(hidden, weight, labels, impl="cpp")
    assert available_impls()["cpp"] in str(warned[0].message)
    assert capsys.readouterr().err.count("building") == (not known and name != "half a library")
    assert build.main() == 1
    assert capsys.readouterr().out == ""


def test_a_failed_build_is_not_tried_again_in_the_process(csrc, monkeypatch):
    broken_compiler(monkeypatch, csrc)
    reason = BACKENDS["cpp"].cannot_run(CPU)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("tried again"))
    assert BACKENDS["cpp"].cannot_run(CPU) == reason
    assert held(build.cached_library().parent) == [".lock", ".log"]


def test_after_a_failed_build_the_next_process_builds(csrc, monkeypatch):
    switch = csrc.parent / "broken"
    monkeypatch.setenv("CXX", compiler(csrc.parent / "cxx", f'[ -e {switch} ] && exit 1; exec c++ "$@"'))
    switch.touch()
    with pytest.raises(build.BuildError, match="failed"):
        build.library()
    switch.unlink()
    assert answer(build.library()) == 42
    assert held(build.cached_library().parent) == [".lock", ".so"]


BUILD = """
import sys
from pathlib import Path
from dpo_kernels import build

build.INSTALLED = Path(sys.argv[1])
print(build.library())
"""


@pytest.mark.parametrize("whole_group", [True, slow(False)], ids=["with-its-children", "alone"])
def test_a_killed_build_leaves_no_shut_lock_and_no_half_library(whole_group, csrc, monkeypatch):
    """One builds and is killed in the compiler while two wait; one of them builds, and both are served."""
    started, hang = csrc.parent / "started", csrc.parent / "hang"
    body = f'[ -e {hang} ] && touch {started} && sleep 120\nexec c++ "$@"'
    monkeypatch.setenv("CXX", compiler(csrc.parent / "cxx", body))
    hang.touch()
    cache = build.cached_library().parent
    processes = [script(BUILD, csrc)]
    with ended(processes):
        wait_for(started.exists)
        assert held(cache) == [".lock", "build"]
        processes += [script(BUILD, csrc), script(BUILD, csrc)]
        time.sleep(0.5)
        hang.unlink()
        (os.killpg if whole_group else os.kill)(processes[0].pid, signal.SIGKILL)
        said = [process.communicate(timeout=60) for process in processes[1:]]
        assert processes[0].wait() == -signal.SIGKILL
    assert [process.returncode for process in processes[1:]] == [0, 0], said
    assert sum(err.count("building") for _, err in said) == 1
    assert {Path(out.strip()) for out, _ in said} == {build.cached_library()}
    assert answer(build.cached_library()) == 42
    assert held(cache) == [".lock", ".so"]


def test_leftovers_of_other_keys_go_unless_they_are_being_built(csrc):
    cache = build.cached_library().parent
    for name in ("build-dpo_kernels_dead-x1", "build-dpo_kernels_alive-x1", "build-release"):  # the last is not ours
        (cache / name).mkdir(parents=True)
        (cache / name / "a.o").write_text("")
    with build._lock("dpo_kernels_alive"):
        build.library()
    assert sorted(path.name for path in cache.glob("build-*")) == ["build-dpo_kernels_alive-x1", "build-release"]


FIRST_USE = """
import sys, time
from pathlib import Path
import torch
from dpo_kernels import hidden_to_log_probs

hidden, weight, labels = torch.randn(70, 33), torch.randn(300, 33), torch.randint(300, (70,))
Path(sys.argv[1], f"ready{sys.argv[2]}").touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
got = hidden_to_log_probs(hidden, weight, labels, impl=None)
exact = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, labels[:, None])[:, 0]
assert hasattr(torch.ops.dpo_kernels_cpp, "accumulate"), "not the kernels"
assert (got - exact).abs().max() < 1e-5
"""


@pytest.mark.slow
def test_four_processes_at_first_use(tmp_path):
    """The kernels themselves, in a hurry: one of four builds them, and all four compute with them."""
    cache = tmp_path / "cache"
    environment = {"DPO_KERNELS_CACHE": str(cache), "DPO_KERNELS_CXXFLAGS": "-O0"}
    processes = [script(FIRST_USE, tmp_path, i, **environment) for i in range(4)]
    with ended(processes):
        wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 4)
        (tmp_path / "go").touch()
        said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert sorted(err.count("dpo_kernels: building") for err in said) == [0, 0, 0, 1]
    assert sorted(err.count("\n") for err in said) == [0, 0, 0, 1]
    assert held(cache) == [".lock", ".so"]


def test_ahead_of_time(csrc, capsys):
    assert build.main() == 0
    library = build.cached_library()
    assert capsys.readouterr().out == f"built: {library}\n"
    assert build.main() == 0
    assert capsys.readouterr() == (f"already built: {library}\n", "")


def test_ahead_of_time_from_the_shell_says_why_it_cannot(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kernels.build"], env=os.environ | {"CXX": "nonexistent"}, cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dpo_kernels.build: the C++ compiler 'nonexistent' does not run")
    assert done.stderr.count("\n") == 1


def test_the_wheel_ships_every_module_and_the_sources(tmp_path):
    for name in ("dpo_kernels", "csrc", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "."]
    made = subprocess.run([*pip, "-w", "dist"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_kernels").rglob("*.py")}
    sources = {f"dpo_kernels/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    pairs = {"dpo_kernels/examples/dpo.jsonl", "dpo_kernels/examples/make_dpo.py"}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_kernels").rglob("*.j2")}
    assert names == modules | sources | pairs | templates | {"dpo_kernels/py.typed"}
    code = "from dpo_kernels import build; print(build.INSTALLED.is_dir(), build.cached_library())"
    installed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path / "site",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert installed.stdout == f"True {build.cached_library()}\n"
