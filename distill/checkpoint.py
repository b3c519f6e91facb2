"""Atomic writes: a file is either the old or the new one, whatever happens meanwhile."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import IO, Any, cast
from zipfile import BadZipFile, ZipFile

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from distill.errors import UserError, one_line, problem_line

PLAIN = frozenset({int, float, bool, str, bytes, NoneType})
CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, torch.Size})
FORMAT = "diffusion-distill checkpoint"
VERSION = 1


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, which
            `torch.load(weights_only=True)` can read; numpy arrays are not allowed.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the state contains
            something else; the previous file is intact.
    """
    _refuse_others(state, "")
    # through memory: torch's zip writer turns a full disk into an unrelated RuntimeError
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "state": state}, buffer)
    with replacing(Path(path)) as file:
        file.write(buffer.getbuffer())


def _refuse_others(value: object, key: str) -> None:
    """Raises UserError naming the first entry that could not be read back."""
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return
    if type(value) not in CONTAINERS:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise UserError(
            f"checkpoint: {key} is a {kind}, which cannot be loaded again; state_dict() may "
            "contain only tensors, numbers, strings, and lists and dicts of them"
        )
    entries: Any = value.items() if isinstance(value, dict) else enumerate(cast(Any, value))
    for name, entry in entries:
        _refuse_others(entry, f"{key}.{name}" if key else str(name))


def load(path: str | os.PathLike[str], *keys: str) -> dict[str, Any]:
    """Read what `save` wrote, with every tensor on the CPU. Runs no code from the file.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint of this program's version, or
            lacks one of the keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; start without --resume, or name another run")
    try:
        with ZipFile(path) as archive:  # torch does not compare the checksums
            if damaged := archive.testzip():
                raise BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise UserError(
            f"{path} is damaged or not a checkpoint; restore it from a backup, or start a new run"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was not written by distill; name a file in a run's checkpoints/")
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content['version']}, but this program reads "
            f"{VERSION}; resume with the version of distill that wrote it, or start a new run"
        )
    state: dict[str, Any] = content["state"]
    if lacking := [key for key in keys if key not in state]:
        raise UserError(f"{path} is another kind of checkpoint: it has no {lacking[0]!r}")
    return state


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file (UTF-8). Raises UserError as `save` does."""
    with replacing(Path(path)) as file:
        file.write(text.encode())


def read_json(
    path: str | os.PathLike[str], *keys: str, kind: type[Any] | None = None
) -> dict[str, Any]:
    """Read the object in a JSON file of a run.

    Args:
        path: the file.
        keys: required keys.
        kind: a type known to pydantic that the object must match.

    Raises:
        UserError: the file is missing or damaged, or its object does not match.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is missing or damaged: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not contain a JSON object")
    if lacking := [key for key in keys if key not in content]:
        raise UserError(f"{path} is damaged: it has no {lacking[0]!r}")
    if kind is not None:
        try:
            TypeAdapter(kind).validate_python(content)
        except ValidationError as error:
            problem = problem_line(error.errors(include_url=False)[0])
            raise UserError(f"{path} is damaged: {problem}") from error
    return content


def existing_parent(path: Path) -> Path:
    """The nearest parent folder of `path` that exists."""
    return next(place for place in path.absolute().parents if place.exists())


def check_folder(option: str, folder: Path) -> None:
    """Check, before the work, that a folder can be written to or made; it is not made yet.

    Args:
        option: what named the folder, such as `--out`.
        folder: the folder, which may not exist yet.
    """
    there = existing_parent(folder / "any")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"{option}: cannot write to {folder}: {there} is not a writable directory; choose "
            "another place"
        )


def check_json(option: str, file: Path) -> None:
    """Check, before the work, that a JSON file of results can be written."""
    if file.suffix != ".json" or file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{option}: {file} must be a .json file in a folder that exists")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{option}: cannot write to {file.parent}: permission denied")


def sync(path: Path) -> None:
    """Wait until a file that something else has written is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what `replacing` and `replacing_folder` left half written below a run's folder when
    they were killed."""
    for file in folder.rglob(".*.[0-9]*.tmp"):
        file.unlink(missing_ok=True)
    for scratch in folder.glob(".*-????????/"):
        if (scratch / "new").is_dir() or (scratch / "old").is_dir():
            shutil.rmtree(scratch)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` only once it is complete and on the disk."""
    # named after its process, as others may write the file too
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it may not be there, or nothing can be removed there
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "disk full" if full else error.strerror
        kept = f"the previous one is intact at {path}" if path.exists() else "nothing was written"
        raise UserError(
            f"{reason} while saving {path}; {kept}; fix that and rerun the command, with "
            "--resume where it has one"
        ) from error


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A path to make a folder at, which replaces `folder` once it is on the disk.

    Its files get the usual permissions: safetensors would make them readable only by their owner.

    Raises:
        OSError: it cannot be written; the previous folder is intact.
    """
    around = existing_parent(folder)
    with tempfile.TemporaryDirectory(dir=around, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        yield new
        ordinary = Path(scratch, "ordinary")
        ordinary.touch()
        mode = ordinary.stat().st_mode
        for path in new.rglob("*"):
            if path.is_file():
                if path.stat().st_mode != mode:
                    path.chmod(mode)
                sync(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            if old.exists() and not folder.exists():  # interrupted between the two
                old.rename(folder)
