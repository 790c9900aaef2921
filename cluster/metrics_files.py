"""The metrics of all processes of a machine at one address.

Replicas listen on ports that nobody knows beforehand, and an address in front of several gives the numbers of one at
a time. So each process writes its own metrics to a folder, as for node_exporter's textfile collector, and
`rayloop metrics` answers with all of them, told apart by the label `process`.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cluster import metrics
from cluster.settings.runtime import MetricsSettings

log = logging.getLogger(__name__)

SUFFIX = ".prom"
PATH = "/metrics"


def publish_metrics(settings: MetricsSettings) -> None:
    """Write this process's metrics from now on, where `metrics.folder` is set."""
    if settings.folder is not None:
        threading.Thread(target=_write_for_ever, args=(settings,), name="metrics-file", daemon=True).start()


def _write_for_ever(settings: MetricsSettings) -> None:
    assert settings.folder is not None
    file = settings.folder / f"{os.getpid()}{SUFFIX}"
    atexit.register(file.unlink, missing_ok=True)
    told = False
    while True:
        try:
            write_metrics(file)
            told = False
        except OSError as error:
            if not told:
                log.warning("metrics cannot be written to %s: %s", file, error)
            told = True
        time.sleep(settings.interval_s)


def write_metrics(file: Path) -> None:
    """The metrics of this process as one file, which nobody sees half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_bytes(metrics.exposition())
    draft.replace(file)


class Written(Collector):
    """What the live processes have written; what one left behind that was killed is removed."""

    def __init__(self, folder: Path, forget_after_s: float) -> None:
        self._folder, self._forget_after_s = folder, forget_after_s

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of every process."""
        families: dict[str, Metric] = {}
        for file in sorted(self._folder.glob(f"*{SUFFIX}")):
            for family in text_string_to_metric_families(self._text(file)):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [s._replace(labels=s.labels | {"process": file.stem}) for s in family.samples]
        yield from families.values()

    def _text(self, file: Path) -> str:
        try:
            if time.time() - file.stat().st_mtime <= self._forget_after_s:
                return file.read_text()
            file.unlink()
        except FileNotFoundError:
            pass  # its process ended just now
        return ""


class MetricsServer(ThreadingHTTPServer):
    """Answers `GET /metrics` with what was written."""

    daemon_threads = True

    def __init__(self, host: str, port: int, written: Written) -> None:
        super().__init__((host, port), _Handler)
        self.written = written


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer

    def do_GET(self) -> None:
        """All metrics, at the one path there is."""
        found = self.path.partition("?")[0] == PATH
        body = generate_latest(self.server.written) if found else b"only /metrics is here\n"
        self.send_response(200 if found else 404)
        self.send_header("content-type", metrics.CONTENT_TYPE[1].decode() if found else "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no news."""
