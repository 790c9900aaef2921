"""`rayloop submit` against a real Ray head with its dashboard on a free port."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.errors import InputError, UnavailableError
from cluster.submit import RayJobFailedError, entrypoint, rayjob_manifest, submit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a Ray head started here, as a foreground process that ends with its children."""
    port = free_port()
    binaries = Path(sys.executable).parent
    line = [binaries / "ray", "start", "--head", "--block", "--port", str(free_port()), "--num-cpus", "4"]
    line += ["--dashboard-port", str(port), "--ray-client-server-port", str(free_port())]
    line += ["--dashboard-agent-listen-port", str(free_port())]  # the default is taken by the session's own cluster
    line += ["--object-store-memory", str(100 * 2**20)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{binaries}:{os.environ['PATH']}"}
    head = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=1).close()
            break
        except OSError:
            time.sleep(0.5)
    yield address
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_submitted_command_runs_on_the_cluster_and_its_output_comes_back(dashboard: str) -> None:
    text: list[str] = []
    environment = {"RAYLOOP_TENANT": "acme"}
    job_id = submit(["config"], dashboard, environment=environment, on_text=text.append)
    assert job_id.startswith("raysubmit_")
    assert re.search(r"tenant\s+acme\s+RAYLOOP_TENANT", "".join(text))


@pytest.mark.ray
@pytest.mark.slow
def test_failed_job_is_an_error_that_carries_the_commands_own_line(dashboard: str) -> None:
    text: list[str] = []
    with pytest.raises(RayJobFailedError, match="ended as FAILED"):
        submit(["config", "--config", "/nope.yaml"], dashboard, environment={}, on_text=text.append)
    assert "error: config='/nope.yaml' does not exist" in "".join(text)


def test_unreachable_cluster_is_one_line() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match=f"no Ray cluster answers at {address}"):
        submit(["config"], address, environment={}, on_text=None)


def test_unknown_command_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InputError, match="command='rm' must be a rayloop command"):
        entrypoint(["rm", "-rf", "/"])


def test_arguments_reach_the_shell_quoted() -> None:
    assert entrypoint(["curate", "--agent", "a b; c"]) == "python -m cluster curate --agent 'a b; c'"


def test_manifest_is_a_rayjob_with_the_command_as_entrypoint() -> None:
    manifest = yaml.safe_load(rayjob_manifest(["curate", "--agent", "triage"], "nightly"))
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("RayJob", "nightly")
    assert manifest["spec"]["entrypoint"] == "python -m cluster curate --agent triage"
