"""A folder that appears under its final name complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlxq.checkpoint import journal

_GOES_ON = "interrupted; the same command goes on where it stopped ({} holds what is done)"
_NOTHING_KEPT = "interrupted; nothing was done yet that could be kept"


@contextlib.contextmanager
def partial_folder(dst: Path, overwrite: bool = False, digest: str | None = None) -> Iterator[Path]:
    """A folder beside `dst` that becomes `dst` when the block ends and vanishes when it raises.

    It is named .<name>.partial-<pid> and locked: what a killed process left behind has lost its lock. The
    next conversion to the same name goes on in it when its journal has the same digest, and removes it
    otherwise; it is empty, then. A KeyboardInterrupt leaves it, as a kill does. With overwrite, an existing
    model folder is replaced at the end. Raises FileExistsError when dst exists, OSError with one sentence
    when the disk is full.
    """
    dst = Path(os.path.abspath(dst))
    check_destination(dst, overwrite)
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder = dst.parent / f".{dst.name}.partial-{os.getpid()}"
    lock, keep = _take_over(dst, folder, digest), False
    if lock is None:
        try:
            folder.mkdir()
        except FileExistsError:
            raise FileExistsError(f"{dst}: this process is converting to it already ({folder})") from None
        lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        journal.remove(folder)
        _sync(*folder.iterdir(), folder)
        _publish(folder, dst, overwrite)
        _sync(dst.parent)
    except KeyboardInterrupt:
        if keep := digest is not None and journal.begun(folder, digest):
            raise KeyboardInterrupt(_GOES_ON.format(folder)) from None
        raise KeyboardInterrupt(_NOTHING_KEPT) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"{dst}: no space left on the device ({error.strerror}); nothing was kept") from error
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)  # gone already when it was published
        os.close(lock)


@contextlib.contextmanager
def kept_folder(dst: Path, purpose: str, digest: str, resume: bool = True) -> Iterator[Path]:
    """The folder .<name>.<purpose> beside `dst`, for work of several steps that another run goes on with.

    It vanishes when the block ends or raises. A kill leaves it, and so does a KeyboardInterrupt once anything
    is in it; the next run finds what is there if its digest is the same and it asks to resume, and an empty
    folder otherwise. Raises FileExistsError while another process has it.
    """
    folder = dst.parent / f".{dst.name}.{purpose}"
    folder.mkdir(parents=True, exist_ok=True)
    lock, keep = os.open(folder, os.O_RDONLY), False
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            keep = True
            raise FileExistsError(f"{dst}: another process is making it ({folder})") from None
        note = folder / "identity"
        if not (resume and note.exists() and note.read_text(encoding="utf-8") == digest):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            note.write_text(digest, encoding="utf-8")
        yield folder
    except KeyboardInterrupt:
        if keep := len(list(folder.iterdir())) > 1:
            raise KeyboardInterrupt(_GOES_ON.format(folder)) from None
        raise KeyboardInterrupt(_NOTHING_KEPT) from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_destination(dst: Path, overwrite: bool) -> None:
    """Raises FileExistsError, with the way out, unless a new folder may take the name."""
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise FileExistsError(f"{dst} exists already: choose another name, remove it, or use --overwrite")
    if not dst.is_dir() or (any(dst.iterdir()) and not (dst / "config.json").is_file()):
        raise FileExistsError(
            f"{dst} exists and is not a model folder (no config.json): it is not overwritten"
        )


def _take_over(dst: Path, target: Path, digest: str | None) -> int | None:
    """The lock of a dead run's folder of this very conversion, now named target; other dead folders go."""
    taken = None
    for folder in sorted(dst.parent.glob(f".{_literal(dst.name)}.partial-*")):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue  # its owner lives
        if taken is None and digest is not None and journal.begun(folder, digest):
            if folder != target:
                os.rename(folder, target)
            taken = lock
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    return taken


def _publish(folder: Path, dst: Path, overwrite: bool) -> None:
    aside = dst.parent / f".{dst.name}.replaced-{os.getpid()}"
    if overwrite and os.path.lexists(dst):
        os.rename(dst, aside)
    try:
        os.rename(folder, dst)
    except OSError as error:
        if os.path.lexists(aside):
            os.rename(aside, dst)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(
                f"{dst} appeared while the model was being written: it is not replaced"
            ) from None
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
