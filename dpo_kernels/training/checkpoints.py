"""Checkpoints that appear whole or not at all: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PREFIX = "checkpoint-"
STAGING = ".incomplete"
REPLACED = ".replaced"


def staging(output_dir: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is written until it is whole; on the same file system as its final place."""
    return Path(output_dir) / STAGING


def publish(staged: Path, target: Path) -> None:
    """Renames a finished folder to its final name; what stood there before goes only after.

    Between the two renames of a replacement the old one is in the staging folder, from where `clean` brings it back.
    """
    _flush(staged)
    old = staged.with_name(f"{target.name}{REPLACED}")
    if target.exists():
        target.replace(old)
    staged.replace(target)
    _fsync(target.parent)
    _discard(old)


def publish_files(staged: Path, target: Path) -> None:
    """Renames each file of a finished folder, and of those in it, into another folder, which may hold more."""
    _flush(staged)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        final = target / path.relative_to(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        path.replace(final)
        _fsync(final.parent)
    shutil.rmtree(staged)


def all_of(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def latest(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none."""
    return max(all_of(output_dir), key=lambda p: int(p.name.removeprefix(PREFIX)), default=None)


def rotate(output_dir: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, never the newest nor the best one."""
    if not limit or limit < 1:
        return
    found = all_of(output_dir)
    spare = [p for p in found[:-1] if best is None or p.name != Path(best).name]
    for path in spare[: max(0, len(found) - limit)]:
        _discard(path, staging(output_dir))


def clean(output_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed run left unfinished; a checkpoint that it was about to replace comes back."""
    for old in staging(output_dir).glob(f"{PREFIX}*{REPLACED}"):
        target = Path(output_dir) / old.name.removesuffix(REPLACED)
        if not target.exists():
            old.replace(target)
    shutil.rmtree(staging(output_dir), ignore_errors=True)


def _discard(folder: Path, through: Path | None = None) -> None:
    """Deletes a folder that is gone at once: a deletion that is cut short leaves no half checkpoint."""
    if folder.exists():
        doomed = (through or folder.parent) / f"{folder.name}.doomed"
        doomed.parent.mkdir(exist_ok=True)
        folder.replace(doomed)
        shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
