"""vLLM's launcher, with a harmless command in vLLM's place."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.errors import ConfigError, UnavailableError
from cluster.settings.engines import EngineSettings, VllmSettings
from serve.engines.vllm.process import IDLE_S, LAUNCHER, VllmProcess, arguments, environment, lora_rank

FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".draft", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".draft", sys.argv[1])
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-I", *sys.argv[1:]], stdin=subprocess.PIPE)
time.sleep(600)
"""


def wait_for(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_everything_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    command = [sys.executable, "-c", PARENT, str(LAUNCHER), sys.executable, "-c", FAMILY, str(note)]
    parent = subprocess.Popen(command)
    wait_for(note.exists, "the family did not start")
    pids = [int(pid) for pid in note.read_text().split()]
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pids), "the family outlived its parent")


def test_a_child_that_ends_takes_what_it_started_along(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    launcher = subprocess.Popen(
        [sys.executable, "-I", str(LAUNCHER), sys.executable, "-c", FAMILY, str(note)], stdin=subprocess.PIPE
    )
    wait_for(note.exists, "the family did not start")
    pids = [int(pid) for pid in note.read_text().split()]
    psutil.Process(pids[0]).kill()
    assert launcher.wait(60) != 0
    wait_for(lambda: gone(pids), "a grandchild outlived its parent")
    assert launcher.stdin is not None
    launcher.stdin.close()


def test_an_interpreter_without_vllm_is_one_clear_line(tmp_path: Path) -> None:
    missing = EngineSettings(vllm=VllmSettings(python="/no/such/python"))
    with pytest.raises(ConfigError, match=r"engine\.vllm\.python='/no/such/python' is no interpreter"):
        VllmProcess(missing, "m", "base")
    silent = VllmProcess(EngineSettings(vllm=VllmSettings(python="/bin/false")), "m", "base")
    with pytest.raises(UnavailableError, match="vLLM did not start"):
        silent.wait_until_up()
    silent.close()
    assert not silent.folder.exists()


def test_the_child_closes_no_connection_that_we_may_still_write_to() -> None:
    assert int(environment(EngineSettings())["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > IDLE_S


@pytest.mark.parametrize("tags", [False, True])
def test_calls_are_held_to_their_form_by_schema_or_by_the_parsers_tags(tags: bool) -> None:
    settings = EngineSettings(vllm=VllmSettings(structural_tags=tags))
    line = arguments(settings, "/model", "base", Path("/s"))
    assert environment(settings)["VLLM_ENFORCE_STRICT_TOOL_CALLING"] == ("1" if tags else "0")
    assert dict(itertools.pairwise(line)).get("--tool-strict-level") == ("parameter" if tags else None)


def test_the_command_line_keeps_every_adapter_in_memory() -> None:
    settings = EngineSettings(max_adapters=12, max_rank=20, max_rows=7, vllm=VllmSettings(extra_arguments=("--x",)))
    line = arguments(settings, "/model", "base", Path("/s"))
    given = dict(itertools.pairwise(line))
    assert (given["--max-cpu-loras"], given["--max-loras"], given["--max-lora-rank"]) == ("12", "8", "32")
    assert (given["--max-num-seqs"], given["--uds"], line[-1]) == ("7", "/s", "--x")
    assert [lora_rank(rank) for rank in (1, 8, 9, 512)] == [8, 8, 16, 512]
    with pytest.raises(ConfigError, match="over vLLM's 512"):
        lora_rank(513)
