"""Checkpoints that appear whole or not at all: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PREFIX = "checkpoint-"
STAGING = ".incomplete"


def staging(output_dir: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is written until it is whole; on the same file system as its final place."""
    return Path(output_dir) / STAGING


def publish(staged: Path, target: Path) -> None:
    """Renames a finished folder to its final name; what stood there before goes only after."""
    _flush(staged)
    if target.exists():
        old = staged.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        staged.replace(target)
        shutil.rmtree(old)
    else:
        staged.replace(target)


def publish_files(staged: Path, target: Path) -> None:
    """Renames each file of a finished folder into another folder, which may hold more."""
    _flush(staged)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(staged.iterdir()):
        path.replace(target / path.name)
    staged.rmdir()


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
        doomed = staging(output_dir) / f"{path.name}.old"
        doomed.parent.mkdir(exist_ok=True)
        path.replace(doomed)  # gone at once: a deletion that is cut short leaves no half checkpoint
        shutil.rmtree(doomed)


def clean(output_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed run left unfinished."""
    shutil.rmtree(staging(output_dir), ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
