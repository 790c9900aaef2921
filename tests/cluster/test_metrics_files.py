"""Metrics of several processes at one address."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import metrics
from cluster.errors import ConfigError
from cluster.metrics_files import MetricsServer, Written, write_metrics
from cluster.settings import load_settings

FORGET_AFTER_S = 30.0
COUNTS = """
import sys
from pathlib import Path
from cluster import metrics
from cluster.metrics_files import write_metrics
metrics.CAPTURED.labels("lost").inc(int(sys.argv[2]))
metrics.LATENCY.labels("t", "w", "triage", "stable").observe(0.3)
write_metrics(Path(sys.argv[1]))
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    with MetricsServer("127.0.0.1", 0, Written(tmp_path, FORGET_AFTER_S)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def samples(text: str, name: str) -> dict[str, float]:
    """Value by process."""
    found = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return {sample.labels["process"]: sample.value for sample in found}


def test_every_process_is_there_once_and_nothing_is_added_up(served: str, tmp_path: Path) -> None:
    for name, count in (("11", 2), ("12", 5)):
        subprocess.run([sys.executable, "-c", COUNTS, str(tmp_path / f"{name}.prom"), str(count)], check=True)
    answer = httpx.get(f"{served}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert samples(answer.text, "rayloop_captured_total") == {"11": 2.0, "12": 5.0}
    assert samples(answer.text, "rayloop_request_seconds_count") == {"11": 1.0, "12": 1.0}
    assert answer.text.count("# TYPE rayloop_captured_total counter") == 1


def test_what_a_killed_process_left_behind_is_removed(served: str, tmp_path: Path) -> None:
    file = tmp_path / "11.prom"
    write_metrics(file)
    past = time.time() - FORGET_AFTER_S - 1
    os.utime(file, (past, past))
    assert httpx.get(f"{served}/metrics").text == "" and not file.exists()


def test_names_of_every_metric_survive_the_way_through_a_file(served: str, tmp_path: Path) -> None:
    """Prometheus must find under the alert rules' names what the processes call so."""
    write_metrics(tmp_path / "11.prom")
    told = set(re.findall(r"^# TYPE (\S+) (\S+)$", httpx.get(f"{served}/metrics").text, re.MULTILINE))
    assert told == set(re.findall(r"^# TYPE (\S+) (\S+)$", metrics.exposition().decode(), re.MULTILINE))


def test_there_is_nothing_else(served: str) -> None:
    assert httpx.get(f"{served}/").status_code == 404


def test_a_file_that_would_be_forgotten_between_two_writes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.forget_after_s must be more than twice"):
        load_settings(metrics={"interval_s": 20})


PUBLISHES = """
import sys, time
from pathlib import Path
from cluster.metrics_files import publish_metrics
from cluster.settings.runtime import MetricsSettings
folder = Path(sys.argv[1])
publish_metrics(MetricsSettings(folder=folder))
while not (written := list(folder.glob("*.prom"))):
    time.sleep(0.01)
print(written[0].name)
"""


def test_a_process_writes_under_its_own_name_and_takes_it_along_when_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    run = subprocess.Popen([sys.executable, "-c", PUBLISHES, str(folder)], stdout=subprocess.PIPE, text=True)
    said, _ = run.communicate(timeout=60)
    assert said.strip() == f"{run.pid}.prom"
    assert list(folder.iterdir()) == []
