"""One run at a time in a folder: two would replace each other's checkpoints and mix their logs."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from dpo_kernels.warn import warn

LOCK_NAME = "_lock"  # push_to_hub leaves out what begins with _
_HELD: dict[Path, int] = {}  # folders of this process, links resolved, and the open file that holds each


class FolderInUseError(ValueError):
    """Another run writes into this folder."""


@contextmanager
def owned(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a folder, which is made, for this process; the system lets go of it however the process ends.

    Forked workers hold nothing: they may outlive a run that was killed.

    Raises:
        FolderInUseError: another process holds it.
        OSError: it cannot be written to.
    """
    folder = Path(output_dir).resolve()
    if folder in _HELD:
        yield
        return
    path = folder / LOCK_NAME
    descriptor = _locked(path)
    _HELD[folder] = descriptor
    try:
        yield
    finally:
        if _HELD.pop(folder, None) == descriptor:  # not in a fork, which leaves its parent's file alone
            # Of a folder that cannot be written to any more: a file that no process holds says nothing.
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _let_go() -> None:
    """In a fork: a flock lasts as long as any process has this opening of the file; a close ends only the fork's."""
    while _HELD:
        os.close(_HELD.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


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
            _lock(path, descriptor)
            if _is_still(path, descriptor):
                said = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
                with suppress(OSError):  # a full disk: only the message of a second run says less
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, said.encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has ended, and removed it, in between


def _lock(path: Path, descriptor: int) -> None:
    """A flock, not a lock of POSIX's: that goes when anything in this process reads the file and closes it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(f"{path.parent} cannot be locked ({error.strerror}): start no second run there")
            return
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise FolderInUseError(
            f"output_dir {path.parent} is in use by another run ({holder or 'it does not say which'}); wait "
            "for it, stop it, or give another --output_dir"
        ) from error


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: removed by another machine, on NFS
            return False
        raise
