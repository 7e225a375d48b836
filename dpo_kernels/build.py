"""Builds the C++ kernels of csrc/ with ninja: just in time at the first call that needs them, or ahead of time with
`python -m dpo_kernels.build`.

A build happens in a directory of its own and is published by one rename, under a lock that the system releases when
its holder dies. The name of what is published holds everything that it depends on: sources, flags, torch, compiler and
the vector instructions of this CPU, so that a cache shared by different machines never serves the wrong one.

Environment: DPO_KERNELS_CACHE, the folder of finished builds (default: ~/.cache/dpo_kernels); CXX, the compiler;
DPO_KERNELS_CXXFLAGS, further flags, such as those of a sanitizer; ATEN_CPU_CAPABILITY (torch's own) avx2 or default
builds for less than the CPU can do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

INSTALLED, CHECKOUT = Path(__file__).with_name("csrc"), Path(__file__).parents[1] / "csrc"
# The instructions for which ATen's Vectorized has a build, by the name that torch gives what a CPU can do.
CAPABILITY_FLAGS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
    "DEFAULT": "",
}
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-maybe-uninitialized -Wno-uninitialized"  # false alarms of GCC 12 in its own headers
)


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message has the cause and the remedy."""


def library() -> Path:
    """The shared library for this machine, built if it is not in the cache yet; says so on stderr.

    Raises:
        BuildError: no sources, compiler or ninja, the compiler failed, or the cache cannot be written.
    """
    target = cached_library()
    if target.exists():
        return target
    ninja = _ninja()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f"{target.stem}.lock"):
            if not target.exists():  # nobody built it while we waited
                _build(target, ninja)
    except OSError as error:
        raise BuildError(
            f"cannot write to {target.parent} ({error}): set DPO_KERNELS_CACHE to another folder"
        ) from error
    return target


def missing() -> str | None:
    """What keeps the kernels from being built here, with the remedy; None if nothing is known to."""
    try:
        if not cached_library().exists():
            _ninja()
    except BuildError as error:
        return str(error)
    return None


def cached_library() -> Path:
    """Where the library for this machine is, or will be.

    Raises:
        BuildError: no sources or no compiler.
    """
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in _sources("*")), *map(str.encode, _facts())):
        digest.update(hashlib.sha256(part).digest())
    return _cache() / f"dpo_kernels_{_capability().lower()}_{digest.hexdigest()[:16]}.so"


def compile_flags() -> list[str]:
    from torch.utils import cpp_extension  # brings setuptools

    capability = _capability()
    defines = f"-DCPU_CAPABILITY={capability} -DCPU_CAPABILITY_{capability} -D_GLIBCXX_USE_CXX11_ABI=1"
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    own = os.environ.get("DPO_KERNELS_CXXFLAGS", "")
    return [*f"{FLAGS} {CAPABILITY_FLAGS[capability]} {defines} {own}".split(), *includes]


def _capability() -> str:
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in CAPABILITY_FLAGS else "DEFAULT"


def _cache() -> Path:
    given = os.environ.get("DPO_KERNELS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_kernels"


def _sources(pattern: str) -> list[Path]:
    folder = INSTALLED if INSTALLED.is_dir() else CHECKOUT
    found = sorted(folder.glob(pattern))
    if not found:
        raise BuildError(f"the sources are not at {folder}: install dpo-kernels again")
    return found


@functools.cache
def _compiler() -> tuple[str, str]:
    """The compiler's command and version."""
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if command is None:
        raise BuildError("no C++ compiler found: install one (apt install g++), or set CXX")
    try:
        version = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {command!r} does not run ({error}): install one, or set CXX") from error
    return command, version.splitlines()[0]


def _ninja() -> str:
    with contextlib.suppress(ImportError):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja not found: pip install ninja")
    return found


def _facts() -> list[str]:
    """What a build depends on beside its sources."""
    return [torch.__version__, *_compiler(), " ".join(compile_flags()), sys.platform]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One holder at a time, among processes; let go when the process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path, ninja: str) -> None:
    print(f"dpo_kernels: building the C++ kernels for {_capability()}, once, about 20 s ...", end="", file=sys.stderr)
    sys.stderr.flush()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        Path(folder, "build.ninja").write_text(_ninja_file(target.name))
        done = subprocess.run([ninja, "-C", folder], capture_output=True, text=True)
        if done.returncode:
            print(" failed", file=sys.stderr)
            raise BuildError(f"the C++ compiler failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        if done.stdout.count("warning:"):
            print(done.stdout, file=sys.stderr)
        Path(folder, target.name).replace(target)
    print(f" done in {time.perf_counter() - start:.0f} s: {target}", file=sys.stderr)


def _ninja_file(name: str) -> str:
    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    from torch.utils import cpp_extension

    sources = _sources("*.cpp")
    libraries = " ".join(
        f"-L{shlex.quote(path)} -Wl,-rpath,{shlex.quote(path)}" for path in cpp_extension.library_paths()
    )
    own = os.environ.get("DPO_KERNELS_CXXFLAGS", "")
    lines = [
        f"cxx = {_compiler()[0]}",
        f"flags = {' '.join(map(shlex.quote, compile_flags()))}",
        f"libraries = {libraries} -ltorch_cpu -ltorch -lc10",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "rule link",
        f"  command = $cxx -shared -fopenmp {own} $in $libraries -o $out",
    ]
    lines += [f"build {path.stem}.o: compile {escape(path)}" for path in sources]
    lines += [f"build {name}: link {' '.join(f'{path.stem}.o' for path in sources)}", f"default {name}", ""]
    return "\n".join(lines)


def main() -> int:
    """Builds for this machine and says what was done; 1 with the cause if it cannot."""
    try:
        there = cached_library().exists()
        print(f"{'already built' if there else 'built'}: {library()}")
    except BuildError as error:
        print(f"dpo_kernels.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
