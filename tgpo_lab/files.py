"""Writing files whole or not at all: write beside, flush to disk, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a text file; a reader sees the old one or the new one, never a part."""
    _write(path, path.with_name(f".{path.name}.writing"), text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """The same for a file that several processes may write at once: each writes its own beside it, the last stays."""
    _write(path, path.with_name(f".{path.name}.{os.getpid()}.writing"), data)


def _write(path: Path, beside: Path, data: bytes) -> None:
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside ``path``; it takes the name ``path`` when the block ends without an error.

    A folder that is already there under that name is replaced.
    """
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for file in beside.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    before = path.with_name(f".{path.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        os.replace(path, before)  # not removed until the new one has its place
    os.replace(beside, path)
    shutil.rmtree(before, ignore_errors=True)


def require_name(path: Path) -> Path:
    """Refuse a path that the file system cannot hold at all, such as one of 300 characters.

    Raises:
        InputError: it cannot.
    """
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"{path} is no possible path ({error.strerror}). Give another.") from error
    return path


def require_writable_folder(path: Path, *, keep: bool = True) -> Path:
    """Make the folder if need be and prove that a file can be written in it.

    Args:
        path: the folder.
        keep: let it stay; otherwise what was made for the proof is removed.

    Raises:
        InputError: it cannot.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]  # from within
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"Cannot write to the folder {path} ({error.strerror}). Give another output folder."
        ) from error
    finally:
        if not keep:
            for folder in made:
                with suppress(OSError):  # it was not made after all, or another process has put something there
                    folder.rmdir()
    return path


@contextmanager
def held_folder(path: Path, held_elsewhere: str) -> Iterator[None]:
    """Hold a folder against other processes by its file ``.lock``; a kill lets go of it.

    Args:
        path: the folder, in which files can be written.
        held_elsewhere: the sentence for whoever comes second.

    Raises:
        InputError: another process holds it, or its file system has no locks.
    """
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(held_elsewhere) from error
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"The folder {path} cannot be locked against a second process ({error}). Give an output folder on "
            "another file system."
        ) from error
    try:
        yield
    finally:
        lock.release()
