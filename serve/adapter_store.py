"""Puts adapters where every engine of the cluster can read them: `storage.adapters`, a folder for each digest."""

import uuid
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from cluster.errors import UnavailableError
from cluster.model_files import ADAPTER_FILES, CANARY_FILE
from cluster.registry import Registry, Version
from cluster.settings.runtime import StorageSettings
from serve.engines.adapter_source import AdapterError, is_uri, open_store, shown


def adapter_location(registry: Registry, version: Version) -> str | None:
    """Where engines find a version's adapter; `None` for a base model. Fetched from the registry and checked.

    Without `storage.adapters` that is the registry's copy on this machine.

    Raises:
        UnavailableError: the store does not take it.
    """
    if version.adapter_sha256 is None:
        return None
    folder = registry.adapter_dir(version)
    storage = registry.settings.storage
    if storage.adapters is None:
        return str(folder)
    location = _within(storage, version.adapter_sha256)
    try:
        _publish(folder, location)
    except (OSError, AdapterError) as error:
        remedy = "mend it or set `storage.adapters` in rayloop.yaml"
        raise UnavailableError(f"{shown(location)} cannot be written ({error}); {remedy}") from None
    return location


def _within(storage: StorageSettings, digest: str) -> str:
    """The folder of a digest at `storage.adapters`; a store's URI says where the store is."""
    assert storage.adapters is not None
    root, _, query = storage.adapters.partition("?")
    if not is_uri(root):
        return str(Path(root).expanduser().resolve() / digest)
    if not query and storage.endpoint_url is not None and root.startswith("s3://"):
        endpoint = urlsplit(storage.endpoint_url)
        query = urlencode({"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme})
    return f"{root.rstrip('/')}/{digest}" + (f"?{query}" if query else "")


def _publish(folder: Path, location: str) -> None:
    """Copy the files that are not there yet, each under its own name only once it is whole."""
    import pyarrow.fs

    store, path = (pyarrow.fs.LocalFileSystem(), location) if not is_uri(location) else open_store(location)
    if local := store.type_name == "local":
        store.create_dir(path, recursive=True)  # an object store has none: a marker would lie about as an object
    for name in (*ADAPTER_FILES, CANARY_FILE):
        if name == CANARY_FILE and not (folder / name).is_file():
            continue
        data = (folder / name).read_bytes()
        info = store.get_file_info(f"{path}/{name}")
        if info.type == pyarrow.fs.FileType.File and info.size == len(data):
            continue
        target = f"{path}/.{name}.{uuid.uuid4().hex}" if local else f"{path}/{name}"
        with store.open_output_stream(target) as file:  # object stores show an object only whole
            file.write(data)
        if local:
            store.move(target, f"{path}/{name}")
