"""One tiny base model with two adapters for all engine tests, and an engine served by uvicorn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.model_files import adapter_digest, describe_base
from cluster.registry import Version
from cluster.settings.engines import EngineSettings
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from tests.serve.engines import models
from tests.serve.upstream import Server


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Llama and its tokenizer."""
    out: Path = models.build_base(tmp_path_factory.mktemp("base"))
    return out


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different ranks and layers, by name."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "red": models.build_adapter(base, root / "red", seed=1, rank=4),
        "blue": models.build_adapter(
            base, root / "blue", seed=2, rank=8, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    }


@pytest.fixture(scope="session")
def make_adapter(base: Path):  # type: ignore[no-untyped-def]
    """`models.build_adapter` for this base."""
    return lambda out, **options: models.build_adapter(base, out, **options)


@pytest.fixture
def version_of(base: Path) -> Callable[..., Version]:
    """A registered version of an adapter directory, as the registry would describe it."""
    location, revision = describe_base(base)

    def make(number: int, adapter: Path | None, **changes: object) -> Version:
        digest = adapter_digest(adapter) if adapter is not None else None
        version = Version(
            id=f"triage/{number}",
            model="triage",
            number=number,
            name=f"v1.2645.{number}",
            base_model=location,
            adapter_path=adapter,
            adapter_sha256=digest,
            rank=4,
            dataset_hash=None,
            dataset_id=None,
            run_id=None,
            tags={"base_revision": revision, "rayloop.tenant": "acme"},
            aliases=(),
        )
        return replace(version, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def engine_settings(base: Path) -> EngineSettings:
    """Settings of the tiny engine: few rows and short chunks, so that tests meet the limits."""
    return EngineSettings(base_model=str(base), max_rows=16, max_queued=64, stream_tokens=3, prefix_block_tokens=4)


@pytest.fixture(scope="session")
def engine(engine_settings: EngineSettings, adapters: dict[str, Path]) -> Iterator[LocalEngine]:
    """The engine with both adapters loaded."""
    engine = LocalEngine(engine_settings)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def engine_url(engine: LocalEngine) -> Iterator[str]:
    """Base URL of the engine's HTTP interface under uvicorn."""
    with Server(EngineApi(engine), "on") as url:
        yield url
