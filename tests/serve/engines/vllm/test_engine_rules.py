"""What the engine around vLLM refuses and keeps, without a vLLM behind it."""

from pathlib import Path

import pytest

from cluster.settings.engines import EngineSettings
from serve.engines.adapter_source import AdapterError
from serve.engines.vllm.engine import VllmEngine


def not_started(settings: EngineSettings) -> VllmEngine:
    engine = object.__new__(VllmEngine)
    engine.settings = settings
    engine._most = {"max_adapters": settings.max_adapters, "max_rank": settings.max_rank}
    return engine


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", ".", "..", "", "x" * 300, "a\n"])
def test_name_that_would_leave_the_folder_of_copies_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="its name must be"):
        not_started(EngineSettings()).load_adapter(name, tmp_path)


def test_limit_that_was_lowered_rises_again_up_to_what_vllm_was_started_with() -> None:
    engine = not_started(EngineSettings(max_adapters=8))
    for wanted, in_force in ((2, 2), (5, 5), (20, 8)):
        engine.apply(EngineSettings(max_adapters=wanted))
        assert engine.settings.max_adapters == in_force
