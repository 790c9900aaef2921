"""Files and folders that appear whole or not at all."""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cluster.errors import InputError

PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EFBIG}
"""Errors that are about the place and not about what is done there."""


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends well.

    An existing `out` is replaced only then. When the block raises, nothing is left behind.

    Raises:
        InputError: the place cannot be written, or is full.
    """
    with _about_place(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with _about_place(out):
            scratch.chmod(0o755)
            yield scratch
            replace_folder(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all; whoever reads it meanwhile reads what it held before."""
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def replace_folder(scratch: Path, out: Path) -> None:
    """Move `scratch` to `out` in one rename, after its files have reached the disk."""
    for file in scratch.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / "old")
        scratch.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(out)


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
