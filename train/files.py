"""Folders and files that appear whole or not at all, also when the process is killed or the machine stops."""

import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cluster.errors import InputError

PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EFBIG}
"""Errors that are about the place and not about what is done there."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
ASIDE = ".{}.aside"
"""Where the old folder is between two renames."""


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends well.

    An existing `out` is replaced only then, in one step. When the block raises, nothing is left behind; what a
    killed process left is swept by the next that writes here.

    Raises:
        InputError: the place cannot be written, or is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        recover(out)
        scratch, held = _scratch(out)
    except OSError as error:
        raise unwritable(out, error) from error
    try:
        with _about_place(out):
            scratch.chmod(0o755)
            yield scratch
            replace_folder(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def check_replaceable(out: Path, marks: Collection[str]) -> None:
    """Refuse to write a folder over what this command has not written: it would remove what is there.

    Raises:
        InputError: `out` is a file, or a folder of other things than those with the files `marks`.
    """
    there = out.expanduser().resolve()
    if there.is_dir() and (all((there / mark).is_file() for mark in marks) or not any(there.iterdir())):
        return
    if there.exists():
        rule = "is a file" if there.is_file() else "holds other files, which would be removed"
        raise InputError("out", str(out), rule, "name a new folder")


def write_file(file: Path, text: str) -> None:
    """Write a file whole: a reader, or a machine that stops, finds the old text or this one.

    Raises:
        InputError: the place cannot be written, or is full.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with _about_place(file):
            with draft.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            draft.replace(file)
            _to_disk(file.parent)
    finally:
        draft.unlink(missing_ok=True)


def recover(out: Path) -> None:
    """Tidy up after processes that were killed while they wrote `out`; one that still writes keeps its scratch."""
    aside = out.with_name(ASIDE.format(out.name))
    if aside.exists() and not out.exists():
        aside.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
    for scratch in out.parent.glob(f".{glob.escape(out.name)}.scratch-*"):
        held = _hold(scratch)
        if held is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(held)


def _scratch(out: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds it for as long as this process lives."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.scratch-", dir=out.parent))
        held = _hold(scratch)
        if held is None:
            held = os.open(scratch, os.O_RDONLY)  # a file system without locks: nobody sweeps there either
        if scratch.exists():
            return scratch, held
        os.close(held)  # swept between the two


def _hold(scratch: Path) -> int | None:
    """A descriptor with the lock of a folder; `None` where another process has it, or the folder is gone."""
    try:
        descriptor = os.open(scratch, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """A folder to work in; when the block raises before it has left a file there, it goes again.

    Raises:
        InputError: it cannot be made or written.
    """
    with _about_place(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with _about_place(out):
            yield
    finally:
        if not any(file.is_file() for file in out.rglob("*")):
            shutil.rmtree(out, ignore_errors=True)


def replace_folder(scratch: Path, out: Path) -> None:
    """Move `scratch` to `out` in one step, after what is in it has reached the disk.

    Where `out` exists the two change places. File systems that cannot do this see two renames, and `recover` takes
    the first back if the process ends between them.
    """
    for path in [*scratch.rglob("*"), scratch]:
        _to_disk(path)
    if not out.exists():
        scratch.rename(out)
    elif not _exchange(scratch, out):
        aside = out.with_name(ASIDE.format(out.name))
        out.rename(aside)
        scratch.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    _to_disk(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; false where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(error, os.strerror(error), str(other))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _about_place(out: Path) -> Iterator[None]:
    """Errors about the place become one clear line; safetensors hides the system's error in its text."""
    try:
        yield
    except OSError as error:
        if error.errno not in PLACE:
            raise
        raise unwritable(out, error) from error
    except SafetensorError as error:
        found = re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))
        if found is None or int(found[2]) not in PLACE:
            raise
        raise unwritable(out, OSError(int(found[2]), found[1])) from error


def unwritable(out: Path, error: OSError) -> InputError:
    """The error for a place that cannot be written: full, read-only, a file where a folder must be."""
    problem = error.strerror or error
    return InputError("out", str(out), f"cannot be written ({problem})", "name a folder with free space")
