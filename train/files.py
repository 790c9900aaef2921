"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import InputError


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends well.

    An existing `out` is replaced only then. When the block raises, nothing is left behind.

    Raises:
        InputError: the parent folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise unwritable(out, error) from None
    try:
        scratch.chmod(0o755)
        yield scratch
        replace_folder(scratch, out)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """A folder to work in; when the block raises before it has left anything there, it goes again.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        if out.is_dir() and not any(file.is_file() for file in out.rglob("*")):
            shutil.rmtree(out, ignore_errors=True)


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


def unwritable(out: Path, error: OSError) -> InputError:
    """The error for a place that cannot be written: full, read-only, a file where a folder must be."""
    return InputError(
        "out", str(out), f"cannot be written ({error.strerror or error})", "name a folder with free space"
    )
