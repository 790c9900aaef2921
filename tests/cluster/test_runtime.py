import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from cluster import runtime
from cluster.runtime import waiting_message
from cluster.settings import load_settings

PROJECT = Path(__file__).parents[2]


def test_waiting_message_names_the_short_resource() -> None:
    message = waiting_message((("CPU", 4.0), ("memory", 1.0)), {"CPU": (1.0, 2.0), "memory": (5.0, 9.0)}, 31.4)
    assert message == (
        "a task has waited 31 s for resources (CPU 4 asked, 1 free of 2); "
        "it can never be placed: raise `ray.num_cpus` or add nodes"
    )


def test_waiting_message_says_that_busy_resources_come_back() -> None:
    message = waiting_message((("CPU", 1.0),), {"CPU": (0.0, 2.0)}, 30.0)
    assert "CPU 1 asked, 0 free of 2" in message
    assert message.endswith("the work waits until some are free")


class State:
    """What the control store says of a cluster of two CPUs, both in use."""

    node_states: ClassVar[list[Any]] = [SimpleNamespace(total_resources={"CPU": 2.0}, available_resources={"CPU": 0.0})]

    def __init__(self, waiting: int) -> None:
        request = SimpleNamespace(resources_bundle={"CPU": 1.0})
        self.pending_resource_requests = [SimpleNamespace(request=request, count=waiting)]


@pytest.mark.parametrize(("waiting", "warns"), [([9, 8, 7, 6, 5, 4, 3, 2, 1], False), ([9] * 9, True)])
def test_tasks_that_get_their_turn_are_no_reason_to_warn(
    waiting: list[int], warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = iter(waiting)
    watch = runtime.SchedulingWatch("address", limit_s=0.09)

    def state_now(address: str) -> State:
        try:
            return State(next(states))
        except StopIteration:
            watch._stop.set()
            raise

    monkeypatch.setattr(runtime, "_resource_state", state_now)
    watch.start()
    watch._thread.join(10)
    assert bool([r for r in caplog.records if "CPU 1 asked, 0 free of 2" in r.getMessage()]) is warns


@pytest.mark.ray
def test_session_inside_another_joins_it(ray_session: None, tmp_path: Path) -> None:
    import ray

    from cluster.runtime import ray_session as open_session

    settings, _ = load_settings(home=tmp_path)
    with open_session(settings) as session:
        assert not session.started
    assert ray.is_initialized()


SCRIPT = """
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
from cluster.runtime import ray_session
from cluster.settings import load_settings
settings, _ = load_settings(ray={"num_cpus": 2, "object_store_mb": 100, "scheduling_warning_s": 1.5})
with ray_session(settings) as session:
    import ray, ray.util
    print("started", session.started, "at", session.address.rpartition(":")[0], ray.util.get_node_ip_address())
    reference = ray.remote(num_cpus=4)(lambda: 1).remote()
    ray.wait([reference], timeout=6)
print("ended", not ray.is_initialized())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_local_session_starts_warns_of_a_hopeless_wait_and_ends(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAYLOOP_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "started True at 127.0.0.1 127.0.0.1" in done.stdout
    assert "ended True" in done.stdout
    assert "CPU 4 asked" in done.stdout and "it can never be placed" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_unreachable_cluster_is_one_clear_error(tmp_path: Path) -> None:
    code = (
        "from cluster.runtime import ray_session\n"
        "from cluster.settings import load_settings\n"
        "from cluster.errors import UnavailableError\n"
        "settings, _ = load_settings(ray={'address': '127.0.0.1:1'})\n"
        "try:\n"
        "    with ray_session(settings): pass\n"
        "except UnavailableError as error:\n"
        "    print('clear:', error)\n"
    )
    environment = os.environ | {"RAYLOOP_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("clear: Ray cluster 127.0.0.1:1 does not answer"), done.stdout + done.stderr


def test_messages_of_ray_stay_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    import ray._private.worker as worker

    for _ in range(2):
        runtime._keep_messages_off_stdout()
    data = {"lines": ["8 worker processes have been started"], "pid": "raylet", "ip": "", "job": None, "is_err": False}
    worker.print_to_stdstream(data, ignore_prefix=False)
    said = capsys.readouterr()
    assert said.out == "" and "8 worker processes" in said.err
