"""One run at a time in a folder: two would replace each other's checkpoints and mix their logs."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

LOCK_NAME = ".lock"
_HELD: dict[Path, int] = {}  # by this process, and how often


class FolderInUseError(ValueError):
    """Another run writes into this folder."""


@contextmanager
def owned(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a folder, which is made, for this process; the system lets go of it however the process ends.

    A lock of POSIX's, which forked workers do not inherit: they may outlive a run that was killed.

    Raises:
        FolderInUseError: another process holds it.
        OSError: it cannot be written to.
    """
    folder = Path(output_dir).absolute()
    if folder in _HELD:
        _HELD[folder] += 1
        try:
            yield
        finally:
            _HELD[folder] -= 1
        return
    path = folder / LOCK_NAME
    descriptor = _locked(path)
    _HELD[folder] = 1
    try:
        yield
    finally:
        del _HELD[folder]
        # Of a folder that cannot be written to any more: a file that no process holds says nothing.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(
                f"output_dir {path.parent} cannot be written to ({error.strerror}); give another --output_dir, or mend "
                "its permissions"
            ) from error
        try:
            import fcntl  # not on Windows

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise FolderInUseError(
                    f"output_dir {path.parent} is in use by another run ({holder or 'it does not say which'}); wait "
                    "for it, stop it, or give another --output_dir"
                ) from error
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): start no second run there", stacklevel=4)
        except ImportError:
            warnings.warn(f"{path.parent} cannot be locked on this system: start no second run there", stacklevel=4)
        if _is_still(path, descriptor):
            said = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
            os.ftruncate(descriptor, 0)
            os.write(descriptor, said.encode())
            return descriptor
        os.close(descriptor)  # the run that held it has ended, and removed it, in between


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
