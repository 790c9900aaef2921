"""One vLLM server for all tests, where an interpreter has vLLM: starting it takes a minute."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.settings.engines import EngineSettings, VllmSettings
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from serve.engines.vllm.engine import VllmEngine
from serve.engines.vllm.http_api import VllmApi
from tests.conftest import skip_or_fail
from tests.serve.engines import models
from tests.serve.upstream import Server

PYTHON = Path(os.environ.get("RAYLOOP_TEST_VLLM", Path(__file__).parents[4] / ".venv-vllm" / "bin" / "python"))
NAMES = ("red", "green", "blue", "late")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    probe = [str(PYTHON), "-c", "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"]
    if shutil.which(PYTHON) is None or subprocess.run(probe, check=False).returncode:
        skip_or_fail(f"no vLLM at {PYTHON}; `make vllm` installs it, or set RAYLOOP_TEST_VLLM to its interpreter")
    return str(PYTHON)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads are as large as vLLM wants them."""
    return models.build_base(tmp_path_factory.mktemp("wide"), hidden=64, heads=2, kv_heads=2)


@pytest.fixture(scope="session")
def wide_adapters(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four adapters of that model, by name."""
    root = tmp_path_factory.mktemp("wide-adapters")
    return {name: models.build_adapter(wide_base, root / name, seed=i, rank=4) for i, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="session")
def vllm_settings(vllm_python: str, wide_base: Path) -> EngineSettings:
    """Settings of both engines, so that their answers can be compared."""
    vllm = VllmSettings(python=vllm_python, enforce_eager=True, unload_wait_s=20.0)
    return EngineSettings(
        base_model=str(wide_base), kind="vllm", vllm=vllm, max_rows=16, max_queued=64, max_rank=16, max_adapters=4,
        max_context_tokens=512, default_max_tokens=32,
    )  # fmt: skip


@pytest.fixture(scope="session")
def vllm_engine(vllm_settings: EngineSettings, wide_adapters: dict[str, Path]) -> Iterator[VllmEngine]:
    """The engine with three adapters; it runs what PyTorch would compile first, for half a minute, as it stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        engine = VllmEngine(vllm_settings)
    try:
        for name in NAMES[:3]:
            engine.load_adapter(name, wide_adapters[name])
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="session")
def vllm_url(vllm_engine: VllmEngine) -> Iterator[str]:
    """Base URL of its HTTP interface."""
    with Server(VllmApi(vllm_engine), "on") as url:
        yield url


@pytest.fixture(scope="session")
def local_engine(vllm_settings: EngineSettings, wide_adapters: dict[str, Path]) -> Iterator[LocalEngine]:
    """The embedded engine with the same model and all four adapters."""
    engine = LocalEngine(vllm_settings)
    for name, path in wide_adapters.items():
        engine.load_adapter(name, path)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def local_url(local_engine: LocalEngine) -> Iterator[str]:
    """Base URL of its HTTP interface."""
    with Server(EngineApi(local_engine), "on") as url:
        yield url
