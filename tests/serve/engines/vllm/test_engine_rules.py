"""What the engine around vLLM refuses and keeps, without a vLLM behind it."""

from pathlib import Path

import pytest

from cluster.settings.engines import EngineSettings
from serve.engines.adapter_source import AdapterError
from serve.engines.vllm.engine import VllmEngine
from serve.engines.vllm.http_api import VllmApi


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


def test_several_required_calls_are_for_those_who_ask_for_them() -> None:
    vllm_api = VllmApi(not_started(EngineSettings()))
    for given, passed in ((None, False), (False, False), (True, True)):
        asked = {"model": "base", "tool_choice": "required", "parallel_tool_calls": given}
        assert vllm_api._checked(asked)["parallel_tool_calls"] is passed
    assert "parallel_tool_calls" not in vllm_api._checked({"model": "base", "tool_choice": "auto"})
