"""The bytes of an adapter's files, from a folder or from an object store: any location that `pyarrow.fs` knows.

A URI says itself where its store is: `s3://bucket/adapters/x?endpoint_override=minio:9000&scheme=http`. Credentials are
the usual ones of the store (AWS_ACCESS_KEY_ID, …, or the machine's role).
"""

from pathlib import Path
from typing import Any

from cluster.errors import RayloopError


class AdapterError(RayloopError):
    """An adapter cannot be loaded; the message says why."""


def is_uri(location: str) -> bool:
    """Whether the location is a store's, not a folder of this machine."""
    return "://" in location


def read_file(location: str, name: str, limit: int) -> bytes:
    """A file of the adapter, whole.

    Raises:
        AdapterError: it is not there, cannot be read, or is longer than `limit` bytes.
    """
    data = read_optional(location, name, limit)
    if data is None:
        raise AdapterError(f"{name} does not exist at {shown(location)}")
    return data


def read_optional(location: str, name: str, limit: int) -> bytes | None:
    """The same; `None` where there is no such file."""
    try:
        return _read_from_store(location, name, limit) if is_uri(location) else _read_from_folder(location, name, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        cause = error.strerror or str(error).splitlines()[0]
        raise AdapterError(f"{name} cannot be read from {shown(location)} ({cause})") from None


def shown(location: str) -> str:
    """The location as it may stand in a message: a URI's query and user may hold secrets."""
    if not is_uri(location):
        return location
    scheme, _, rest = location.partition("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def open_store(location: str) -> tuple[Any, str]:
    """The file system of a URI, and the path on it.

    Raises:
        AdapterError: nothing `pyarrow.fs` knows.
    """
    import pyarrow as pa
    import pyarrow.fs

    try:
        store, path = pyarrow.fs.FileSystem.from_uri(location)
    except (pa.ArrowException, ValueError) as error:
        raise AdapterError(f"{shown(location)} is no location ({str(error).splitlines()[0]})") from None
    return store, path.rstrip("/")


def _read_from_folder(location: str, name: str, limit: int) -> bytes:
    file = Path(location) / name
    _check_size(name, file.stat().st_size, limit)
    return file.read_bytes()


def _read_from_store(location: str, name: str, limit: int) -> bytes:
    store, path = open_store(location)
    with store.open_input_file(f"{path}/{name}") as file:
        _check_size(name, file.size(), limit)
        data: bytes = file.read()
    return data


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise AdapterError(f"{name} has {size} bytes, more than {limit}")
