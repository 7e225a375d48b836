"""Checkpoints that appear whole or not at all: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_kernels.warn import warn

PREFIX = "checkpoint-"
STAGING = ".incomplete"
REPLACED = ".replaced"
SET_ASIDE = ".set-aside"
STATE_NAME = "trainer_state.json"
REFERENCE_NAME = "dpo_reference.safetensors"  # a reference that moves
FACTS_NAME = "dpo_checkpoint.json"  # the sizes of a checkpoint's files, and what it was trained on
# A model is one by these: where they are last to come, one that came in part is none.
LAST = ("config.json", "adapter_config.json")
WEIGHTS = re.compile(r"(\w+)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# What is written beside and renamed, as long as it is not whole.
UNFINISHED = re.compile(
    r"\.(curves\.png|lengths\.png|(log\.jsonl|report\.html|README\.md|model_card\.md|skipped.*\.jsonl)\.\d+)"
)
# What PyTorch says, as RuntimeError, of files that cannot be written, and of those that cannot be read or do not fit.
UNWRITTEN = re.compile(r"PytorchStreamWriter|inline_container|file write failed|unexpected pos")
UNREAD = re.compile(r"PytorchStreamReader|inline_container|unexpected pos|size mismatch|loading state_dict")


class SaveError(OSError):
    """A checkpoint or a model could not be written; says what is saved."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, or cannot be gone on from."""


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
    with suppress(OSError):  # `clean` takes it away
        _discard(old)


def publish_files(staged: Path, target: Path) -> None:
    """Renames each file of a finished model's folder, and of those in it, into another folder, which may hold more.

    From the first change there on the folder's name says that it is whole, so that `clean` can go on where a kill ended
    it. A model that is replaced is first made one that cannot be loaded: a mixture of the two never can.

    Raises:
        SaveError: the files are whole, and could not be put in their place.
    """
    _flush(staged)
    _finish(target)  # a save that was killed
    staged.replace(_named(target, "whole"))
    _fsync(staging(target))
    try:
        _finish(target)
    except OSError as error:
        raise SaveError(
            f"the model is written, and could not be put in its place in {target} ({error}): its files, or the rest of "
            f"them, are in {staging(target)}. Mend the folder, then save it again, or start again with "
            "--resume_from_checkpoint"
        ) from error
    _remove_if_empty(staging(target))


def all_of(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def latest(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run, None if there is none."""
    return max(all_of(output_dir), key=step_of, default=None)


def rotate(output_dir: str | os.PathLike[str], limit: int | None, best: str | None, saved: Path | None = None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, never the one just saved (None: the newest) nor the best one."""
    if not limit or limit < 1:
        return
    found = all_of(output_dir)
    kept = {(saved or found[-1]).name if found else "", Path(best).name if best is not None else ""}
    spare = [p for p in found if p.name not in kept]
    try:
        for path in spare[: max(0, len(found) - limit)]:
            _discard(path, staging(output_dir))
    except OSError as error:
        warn(f"{path} is beyond save_total_limit, and cannot be deleted ({error})")


def set_aside(checkpoint: Path) -> Path:
    """Gives a checkpoint a name by which no run takes it up; returns it."""
    target = checkpoint.with_name(f"{checkpoint.name}{SET_ASIDE}")
    number = 2
    while target.exists():
        target, number = checkpoint.with_name(f"{checkpoint.name}{SET_ASIDE}-{number}"), number + 1
    checkpoint.replace(target)
    _fsync(target.parent)
    return target


def clean(output_dir: str | os.PathLike[str]) -> None:
    """Ends what a killed run left unfinished.

    A model that was whole is put in its place, a checkpoint that was about to be replaced comes back; the rest goes.
    """
    target = Path(output_dir)
    _finish(target)
    for old in staging(target).glob(f"{PREFIX}*{REPLACED}"):
        final = target / old.name.removesuffix(REPLACED)
        if not final.exists():
            old.replace(final)
    shutil.rmtree(staging(target), ignore_errors=True)
    for part in target.glob(".*"):  # of files that are written beside and renamed
        if UNFINISHED.fullmatch(part.name):
            part.unlink(missing_ok=True)


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes beside a checkpoint's files how large each is, and what it was trained on."""
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    sizes.pop(FACTS_NAME, None)
    (folder / FACTS_NAME).write_text(json.dumps({"files": sizes, **facts}, indent=1), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` wrote; nothing where a checkpoint has none, as those of other programs."""
    try:
        return dict(json.loads((folder / FACTS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """A reference that moves, beside a checkpoint's files."""
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    save_file({name: t.detach().cpu().contiguous() for name, t in whole.items()}, folder / REFERENCE_NAME)


def read_tensors(folder: Path, into: dict[str, Any]) -> None:
    """
    Raises:
        CheckpointError: the checkpoint holds none, or others.
    """
    if not (folder / REFERENCE_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no reference ({REFERENCE_NAME}): it was trained without sync_ref_model; go on without it"
        )
    found = load_file(folder / REFERENCE_NAME)
    if found.keys() != into.keys():
        raise CheckpointError(f"{folder / REFERENCE_NAME} holds other tensors than this reference: {sorted(found)[:3]}")
    for name, tensor in into.items():
        tensor.copy_(found[name])


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, in words; "" of a whole one."""
    if not (folder / STATE_NAME).is_file():
        return f"has no {STATE_NAME}"
    for name in (STATE_NAME, FACTS_NAME):
        if (folder / name).exists() and not _is_json(folder / name):
            return f"has a {name} that is no JSON"
    for name, size in read_facts(folder).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"has no {name}"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size:,} bytes of {name}, not the {size:,} that were saved"
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"has only a part of {path.name}"
        if path.suffix in (".pt", ".pth") and path.is_file() and not zipfile.is_zipfile(path):
            return f"has only a part of {path.name}"
    return ""


@contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Raises:
        CheckpointError: what is read inside cannot be read, or does not fit the model.
        RuntimeError: of another kind, as where the device is out of memory.
    """
    try:
        yield
    except CheckpointError:  # says what is wrong, and what to do
        raise
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, RuntimeError) and not UNREAD.search(str(error)):
            raise
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read, or is not of this model ({type(error).__name__}: {error}); go on "
            "from an older one with --resume_from_checkpoint FOLDER, or check --ref_weight and --from_weight"
        ) from error


@contextmanager
def writing(what: str, staged: Path | None, target: Path, output_dir: Path) -> Iterator[None]:
    """Takes away again what could not be written to its end.

    Args:
        staged: what to take away; None: nothing, as where other processes write there too. `clean` does it then.
        target: where it was to be saved.
        output_dir: of the run, with its checkpoints.

    Raises:
        SaveError: a file could not be written; says what there is to go on from.
    """
    try:
        yield
    except SaveError:  # says it already
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not UNWRITTEN.search(str(error)):
            raise
        free = ""
        with suppress(OSError):
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
                _remove_if_empty(staged.parent)
        with suppress(OSError):
            free = f"; {shutil.disk_usage(target).free / 2**20:,.0f} MiB are free there"
        said = str(error)
        if isinstance(error, RuntimeError):
            said = f"PyTorch could not write a file to its end, as on a full disk: {said.splitlines()[0]}"
        newest = latest(output_dir)
        saved = "there is no checkpoint: nothing of this training is saved. Make room or mend the folder"
        if newest:
            saved = (
                f"what was saved before is as it was, the newest checkpoint is {newest}. Make room or mend the folder, "
                "then go on with --resume_from_checkpoint"
            )
        raise SaveError(f"{what} could not be written to {target} ({said}{free}); {saved}") from error


def _named(target: Path, state: str) -> Path:
    """A finished model on its way: whole, and clear once nothing of an older one can be loaded with its files."""
    return staging(target) / f"model.{state}"


def _finish(target: Path) -> None:
    """Puts a model that is whole into its place; after a kill this goes on where it was."""
    whole, clear = _named(target, "whole"), _named(target, "clear")
    if whole.exists():
        _take_apart(target, whole)
        whole.replace(clear)
        _fsync(clear.parent)
    if clear.exists():
        files = (path for path in clear.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: (path.name in LAST, path)):
            final = target / path.relative_to(clear)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
            _fsync(final.parent)
        shutil.rmtree(clear)


def _take_apart(target: Path, new: Path) -> None:
    """Deletes what makes the files of an older model one, then its weights: the new one may have fewer, larger ones."""
    names = {path.name for path in new.iterdir()}
    stems = {found[1] for name in names if (found := WEIGHTS.fullmatch(name))}
    target.mkdir(parents=True, exist_ok=True)
    for name in names & set(LAST):
        (target / name).unlink(missing_ok=True)
    _fsync(target)
    for path in target.iterdir():
        if (found := WEIGHTS.fullmatch(path.name)) and found[1] in stems:
            path.unlink()
    _fsync(target)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says: 8 bytes of the header's length, the header, the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _discard(folder: Path, through: Path | None = None) -> None:
    """Deletes a folder that is gone at once: a deletion that is cut short leaves no half checkpoint."""
    if folder.exists():
        doomed = (through or folder.parent) / f"{folder.name}.doomed"
        doomed.parent.mkdir(exist_ok=True)
        folder.replace(doomed)
        shutil.rmtree(doomed)
        _remove_if_empty(doomed.parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
