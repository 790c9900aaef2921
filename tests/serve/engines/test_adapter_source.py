"""Adapters from folders and object stores: the same bytes, the same checks, one clear line for what is wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UnavailableError
from cluster.registry import Version
from cluster.settings import load_settings
from serve.adapter_store import adapter_location
from serve.engines.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_bytes
from serve.engines.adapter_source import AdapterError, shown
from serve.engines.local import LocalEngine
from tests.serve.engines.s3_double import S3Double
from tests.serve.upstream import Server


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Double, str]]:
    """An S3-compatible server, and its address."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    double = S3Double()
    with Server(double) as url:
        yield double, url


class OneVersion:
    """A registry of one version, whose adapter lies in a folder."""

    def __init__(self, folder: Path, **storage: Any) -> None:
        self.folder = folder
        self.settings = load_settings(home=folder / "home", storage=storage)[0]

    def adapter_dir(self, version: Version) -> Path:
        return self.folder


def uri(url: str, path: str) -> str:
    return f"s3://models/{path}?endpoint_override={url.removeprefix('http://')}&scheme=http"


def test_file_uri_gives_the_bytes_of_the_folder(adapters: dict[str, Path]) -> None:
    red = adapters["red"]
    assert read_bytes(f"file://{red}") == read_bytes(red)
    found = read_adapter(f"file://{red}", max_rank=64)
    assert (found.sha256, found.location) == (read_adapter(red, max_rank=64).sha256, f"file://{red}")


def test_engine_serves_an_adapter_from_an_object_store(
    store: tuple[S3Double, str], engine: LocalEngine, adapters: dict[str, Path], version_of: Callable[..., Version]
) -> None:
    double, url = store
    version = version_of(3, adapters["red"])
    registry: Any = OneVersion(adapters["red"], adapters="s3://models/adapters", endpoint_url=url)
    location = adapter_location(registry, version)
    assert location is not None
    assert sorted(double.objects) == [
        f"models/adapters/{version.adapter_sha256}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    sent = sum(request.startswith("PUT") for request in double.requests)
    assert adapter_location(registry, version) == location  # what is there is not sent again
    assert sum(request.startswith("PUT") for request in double.requests) == sent
    assert engine.load_adapter("from-store", location, expected_sha256=version.adapter_sha256).rank == 4
    assert engine.unload_adapter("from-store")


def test_bytes_that_are_not_the_registrys_are_refused(
    store: tuple[S3Double, str], engine: LocalEngine, adapters: dict[str, Path]
) -> None:
    double, url = store
    for name, data in read_bytes(adapters["blue"]).items():
        double.objects[f"models/x/{name}"] = data
    with pytest.raises(AdapterError, match="the registry recorded"):
        engine.load_adapter("x", uri(url, "x"), expected_sha256="ab" * 32)
    double.objects[f"models/x/{WEIGHTS_FILE}"] = double.objects[f"models/x/{WEIGHTS_FILE}"][:-100]
    with pytest.raises(AdapterError, match="truncated"):
        engine.load_adapter("x", uri(url, "x"))
    assert "x" not in {model.name for model in engine.models()}


def test_what_a_store_does_not_have_is_one_line_without_its_secrets(store: tuple[S3Double, str]) -> None:
    _, url = store
    location = uri(url, "nothing").replace("s3://", "s3://key:hidden@")
    with pytest.raises(AdapterError, match=rf"{CONFIG_FILE} does not exist at s3://models/nothing$") as refused:
        read_bytes(location)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("nonsense://x/y", "is no location"),
        ("/no/such/folder", "does not exist at /no/such/folder"),
        ("file:///no/such/folder", "does not exist at file:///no/such/folder"),
    ],
)
def test_location_that_leads_nowhere_says_so(location: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        read_bytes(location)


def test_file_that_is_too_long_is_not_read(adapters: dict[str, Path]) -> None:
    for location in (str(adapters["red"]), f"file://{adapters['red']}"):
        with pytest.raises(AdapterError, match="more than"):
            read_bytes(location, max_mb=0.0001)


def test_without_a_store_engines_read_the_registrys_copy(
    adapters: dict[str, Path], version_of: Callable[..., Version], tmp_path: Path
) -> None:
    version = version_of(3, adapters["red"])
    plain: Any = OneVersion(adapters["red"])
    assert adapter_location(plain, version) == str(adapters["red"])
    assert adapter_location(plain, version_of(1, None)) is None
    shared: Any = OneVersion(adapters["red"], adapters=str(tmp_path / "shared"))
    location = adapter_location(shared, version)
    assert location == str(tmp_path / "shared" / str(version.adapter_sha256))
    assert {path.name for path in Path(location).iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_store_that_takes_nothing_is_an_error_with_its_remedy(
    adapters: dict[str, Path], version_of: Callable[..., Version]
) -> None:
    broken: Any = OneVersion(adapters["red"], adapters="nonsense://x")
    with pytest.raises(UnavailableError, match=r"storage\.adapters"):
        adapter_location(broken, version_of(3, adapters["red"]))


def test_message_shows_neither_user_nor_query() -> None:
    assert shown("s3://key:secret@bucket/x?endpoint_override=h&secret=1") == "s3://bucket/x"
