"""Builds the C++ kernels of csrc/ with ninja: just in time at the first call that needs them, or ahead of time with
`python -m dpo_kernels.build`.

A build happens in a directory of its own and is published by one rename, under a lock that the system releases when
its holder dies; what a killed build left is removed by the next one. The name of what is published holds all that it
depends on: sources, flags, torch, compiler and the vector instructions of this CPU, so that a cache shared by different
machines never serves the wrong one.

Environment: DPO_KERNELS_CACHE, the folder of finished builds (default: ~/.cache/dpo_kernels); CXX, the compiler;
DPO_KERNELS_CXXFLAGS, further flags, such as those of a sanitizer; ATEN_CPU_CAPABILITY (torch's own) avx2 or default
builds for less than the CPU can do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

TORCH = Path(torch.__file__).parent
INSTALLED, CHECKOUT = Path(__file__).with_name("csrc"), Path(__file__).parents[1] / "csrc"
# The instructions for which ATen's Vectorized has a build, by the name that torch gives what a CPU can do.
CAPABILITY_FLAGS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "AVX2": "-mavx2 -mfma -mf16c",
    "DEFAULT": "",
}
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-strict-aliasing -Wall -Wextra "
    "-Wno-maybe-uninitialized -Wno-uninitialized"  # false alarms of GCC 12 in its own headers
)


_loaded: Path | None = None  # by this process


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message has the cause and the remedy."""


def load() -> Path:
    """Loads the library for this machine, built if need be, so that `torch.ops.dpo_kernels_cpp` has the kernels.

    Raises:
        BuildError: it cannot be built, or not be loaded.
    """
    global _loaded
    path = library()
    if _loaded == path:
        return path
    if _loaded is not None:
        raise BuildError(f"{_loaded} is loaded already, and a process can have one: start another for {path}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path} ({error}): delete it, and it is built again") from error
    _loaded = path
    return path


def library() -> Path:
    """The shared library for this machine, built if it is not in the cache yet; says so on stderr.

    Raises:
        BuildError: no sources, compiler or ninja, the compiler failed, or the cache cannot be written.
    """
    target = cached_library()
    try:
        if target.exists():
            return target
        ninja = _ninja()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.stem):
            if not target.exists():  # nobody built it while we waited
                _build(target, ninja)
    except OSError as error:
        raise _unwritable(str(error)) from error
    return target


def missing() -> str | None:
    """What keeps the kernels from being built here, with the remedy; None if nothing is known to."""
    try:
        target = cached_library()
        if not target.exists():
            _ninja()
            there = next(folder for folder in target.parents if folder.exists())
            if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
                raise _unwritable(str(there))
    except BuildError as error:
        return str(error)
    except OSError as error:
        return str(_unwritable(str(error)))
    return None


def cached_library() -> Path:
    """Where the library for this machine is, or will be.

    Raises:
        BuildError: no sources or no compiler.
    """
    digest = hashlib.sha256()
    sources = [*_sources("*.cpp"), *_sources("*.h")]
    texts = (*_facts(), *(path.name for path in sources))
    for part in (*map(str.encode, texts), *(path.read_bytes() for path in sources)):
        digest.update(hashlib.sha256(part).digest())
    return _cache() / f"dpo_kernels_{_capability().lower()}_{digest.hexdigest()[:16]}.so"


def compile_flags() -> list[str]:
    capability = _capability()
    abi = int(torch.compiled_with_cxx11_abi())
    defines = f"-DCPU_CAPABILITY={capability} -DCPU_CAPABILITY_{capability} -D_GLIBCXX_USE_CXX11_ABI={abi}"
    return [*f"{FLAGS} {CAPABILITY_FLAGS[capability]} {defines}".split(), *_own_flags(), f"-isystem{TORCH / 'include'}"]


def _own_flags() -> list[str]:
    return shlex.split(os.environ.get("DPO_KERNELS_CXXFLAGS", ""))


def _capability() -> str:
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in CAPABILITY_FLAGS else "DEFAULT"


def _cache() -> Path:
    given = os.environ.get("DPO_KERNELS_CACHE")
    if given:
        return Path(given).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_kernels"
    except RuntimeError as error:  # a user without a home
        raise _unwritable(str(error)) from error


def _unwritable(cause: str) -> BuildError:
    return BuildError(f"cannot write to the folder of finished builds ({cause}): set DPO_KERNELS_CACHE to another one")


def _sources(pattern: str) -> list[Path]:
    folder = INSTALLED if INSTALLED.is_dir() else CHECKOUT
    found = sorted(folder.glob(pattern))
    if not found:
        raise BuildError(f"the sources are not at {folder}: install dpo-kernels again")
    return found


def compiler() -> tuple[str, str]:
    """The compiler's command and version."""
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if command is None:
        raise BuildError("no C++ compiler found: install one (apt install g++), or set CXX")
    return command, _version(command)


@functools.cache
def _version(compiler: str) -> str:
    try:
        command = [*shlex.split(compiler), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {compiler!r} does not run ({error}): install one, or set CXX") from error


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
    return [torch.__version__, *compiler(), *compile_flags(), sys.platform, platform.machine()]


@contextlib.contextmanager
def _lock(key: str, wait: bool = True) -> Iterator[None]:
    """One holder a key at a time, among processes; let go when the process ends, however it ends.

    Raises:
        OSError: the lock cannot be opened, or another holds it and we do not wait.
    """
    try:
        import fcntl
    except ImportError:
        raise BuildError(f"the kernels are not built on {sys.platform}") from None
    with (_cache() / f"{key}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _build(target: Path, ninja: str) -> None:
    """Builds under the lock of target.stem, which the caller holds."""
    print(f"dpo_kernels: building the C++ kernels for {_capability()}, once, about 15 s ...", end="", file=sys.stderr)
    sys.stderr.flush()
    start = time.perf_counter()
    _remove_leftovers(target.stem)
    log = target.with_suffix(".log")
    with tempfile.TemporaryDirectory(prefix=f"build-{target.stem}-", dir=target.parent) as folder:
        Path(folder, "build.ninja").write_text(_ninja_file(target.name))
        try:
            done = subprocess.run([ninja, "-C", folder], capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"ninja does not run ({error}): pip install --force-reinstall ninja") from error
        said = done.stdout + done.stderr
        if done.returncode:
            print(" failed", file=sys.stderr)
            log.write_text(said)
            raise BuildError(
                f"the C++ compiler {compiler()[0]!r} failed; {log} has all that it said. It takes one of C++20: "
                f"install a newer one, or set CXX.\n{_first_error(said)}"
            )
        log.unlink(missing_ok=True)
        Path(folder, target.name).replace(target)
    print(f" done in {time.perf_counter() - start:.0f} s: {target}", file=sys.stderr)
    if "warning:" in said:
        print(said, file=sys.stderr)


def _remove_leftovers(key: str) -> None:
    """Removes the folders of builds that were killed: of this key, and of others whose lock nobody holds."""
    for folder in _cache().glob("build-dpo_kernels_*"):
        other = folder.name.removeprefix("build-").rpartition("-")[0]
        with contextlib.suppress(OSError), contextlib.nullcontext() if other == key else _lock(other, wait=False):
            shutil.rmtree(folder, ignore_errors=True)


def _first_error(said: str) -> str:
    """A few lines around the first error, without ninja's own and the commands."""
    noise = ("[", "FAILED", "ninja:", compiler()[0])
    lines = [line for line in said.splitlines() if not line.startswith(noise)]
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[max(0, first - 2) : first + 8])


def _ninja_file(name: str) -> str:
    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(parts: list[str]) -> str:
        return shlex.join(parts).replace("$", "$$")

    sources, libraries = _sources("*.cpp"), str(TORCH / "lib")
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    lines = [
        f"cxx = {compiler()[0].replace('$', '$$')}",
        "rule compile",
        f"  command = $cxx {command(compile_flags())} -c $in -o $out",
        "rule link",
        f"  command = $cxx -shared -fopenmp {command(_own_flags())} $in {command(link)} -o $out",
    ]
    lines += [f"build {path.stem}.o: compile {escape(path)}" for path in sources]
    lines += [f"build {name}: link {' '.join(f'{path.stem}.o' for path in sources)}", f"default {name}", ""]
    return "\n".join(lines)


def main() -> int:
    """Builds and loads for this machine and says what was done; 1 with the cause if it cannot."""
    try:
        there = missing() is None and cached_library().exists()
        print(f"{'already built' if there else 'built'}: {load()}")
    except BuildError as error:
        print(f"dpo_kernels.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
