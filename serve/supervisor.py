"""The process behind `rayloop up`: one Ray cluster on this machine with the Serve applications in it.

It starts everything, writes what it started to `<home>/run/up.json`, and ends exactly that on SIGTERM.
Run by `serve.cli`, as `python -m serve.supervisor HOME`.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.logs import configure_logging
from cluster.runtime import system_config
from cluster.settings import Settings
from serve.config import SERVE_FILE, SETTINGS_FILE, read_settings, write_private
from serve.ingress import ingress_environment, write_haproxy_script
from serve.ports import free_ports

log = logging.getLogger(__name__)

RUN_RECORD = "run/up.json"
PROJECT = Path(__file__).resolve().parents[1]
RECORD_EVERY_S = 5.0
POLL_S = 0.1
END_S = 10.0
FAILED = {"DEPLOY_FAILED", "UNHEALTHY"}


def main() -> None:
    """Start, wait for a signal, end."""
    home = Path(sys.argv[1])
    settings = read_settings({"settings": str(home / SETTINGS_FILE)})
    configure_logging(settings.logging)
    live = LiveSide(settings)
    live.listen()
    try:
        live.start(with_mlflow="--mlflow" in sys.argv)
        while not live.stop.wait(RECORD_EVERY_S):
            live.record(ready=True)
    except StoppedError:
        log.info("stopped while starting")
    except Exception as error:
        log.exception("the live side did not start")
        live.failure = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        live.record(ready=False)
        sys.exit(1)
    finally:
        live.end()


class StoppedError(Exception):
    """Somebody asked for the end before everything ran."""


class LiveSide:
    """What runs on behalf of one `rayloop up`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.urls: dict[str, str] = {}
        self.pids = {"supervisor": os.getpid()}
        self.address = ""
        self.stop = threading.Event()
        self.failure: str | None = None
        self._folder = settings.home / "run"
        self._mlflow: subprocess.Popen[bytes] | None = None

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as the wish to end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop.set())

    def start(self, *, with_mlflow: bool) -> None:
        """Ray, then the applications; returns when all of them run."""
        self.record(ready=False)
        prepare_environment(self.settings, self._folder)
        if with_mlflow:
            self._start_mlflow()
        self._start_ray()
        self.listen()  # Ray has put its own handlers there
        self.record(ready=False)
        self._deploy()
        self.urls["api"] = f"http://{self.settings.serve.host}:{self.settings.serve.port}/v1"
        self.record(ready=True)

    def _start_ray(self) -> None:
        import ray

        (port,) = free_ports(1)
        dashboard = self.settings.serve.dashboard
        context = ray.init(
            address="local",
            num_cpus=self.settings.ray.num_cpus,
            object_store_memory=self.settings.ray.object_store_mb * 2**20,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=port if dashboard else None,
            namespace="serve",
            log_to_driver=False,
            logging_level=logging.WARNING,
            _system_config=system_config(self.settings),
        )
        self.address = context.address_info["gcs_address"]
        if dashboard:
            self.urls["dashboard"] = f"http://{context.address_info['webui_url']}"

    def _deploy(self) -> None:
        """By config from the start: after `serve.run` the first config would restart every deployment."""
        import ray.serve
        from ray.serve._private.api import serve_start
        from ray.serve.schema import ServeDeploySchema

        document = yaml.safe_load((self.settings.home / SERVE_FILE).read_text(encoding="utf-8"))
        config = ServeDeploySchema.model_validate(document)
        client = serve_start(
            http_options=config.http_options.model_dump(),
            proxy_location=config.proxy_location,
            global_logging_config=config.logging_config,
        )
        client.deploy_apps(config)
        deadline = time.monotonic() + self.settings.serve.start_timeout_s
        while waiting := _not_running(ray.serve.status(), [a.name for a in config.applications]):
            self._pause(deadline, ", ".join(waiting))
        client.wait_for_proxies_serving(wait_for_applications_running=True)
        while "gateway" in self.settings.serve.applications and not self._answers():
            self._pause(deadline, "the router (it cannot read the database)")

    def _answers(self) -> bool:
        """The router answers through the ingress and has read its routes and keys."""
        url = f"http://{self.settings.serve.host}:{self.settings.serve.port}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _pause(self, deadline: float, waiting_for: str) -> None:
        if self.stop.wait(POLL_S):
            raise StoppedError
        if time.monotonic() > deadline:
            limit_s = self.settings.serve.start_timeout_s
            raise TimeoutError(f"{waiting_for} did not start in {limit_s:g} s; see {self._log}")

    @property
    def _log(self) -> Path:
        return self._folder / "up.log"

    def _start_mlflow(self) -> None:
        (port,) = free_ports(1)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "ui",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", self.settings.tracking_uri]
        with (self._folder / "mlflow.log").open("wb") as file:
            # Only its pages are wanted: its own job runner would start eight more processes.
            environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._mlflow = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.pids["mlflow"] = self._mlflow.pid
        self.urls["mlflow"] = f"http://127.0.0.1:{port}"

    def record(self, *, ready: bool) -> None:
        """Write down what runs, with start times, so that nothing else is ever ended for it."""
        document: dict[str, Any] = {
            "ready": ready,
            "failure": self.failure,
            "pids": self.pids,
            "urls": self.urls,
            "ray_address": self.address,
            "started": {str(p.pid): p.create_time() for p in _family()},
        }
        write_private(self.settings.home / RUN_RECORD, json.dumps(document, indent=1))

    def end(self) -> None:
        """End every process started here; the record goes last, unless it tells of a failure."""
        family = _family()
        import ray

        if ray.is_initialized():
            self._drain()
            ray.shutdown()
        end_processes(_still_there(family), END_S)
        shutil.rmtree(sockets_folder(os.getpid()), ignore_errors=True)
        if self.failure is None:
            (self.settings.home / RUN_RECORD).unlink(missing_ok=True)

    def _drain(self) -> None:
        """Let replicas finish what they have and write what they captured."""
        import ray.serve

        if "api" in self.urls:
            try:
                ray.serve.shutdown()
            except Exception as error:  # whatever hinders it, the processes end below
                log.warning("the applications did not end by themselves: %s", error)


def sockets_folder(pid: int) -> Path:
    """Where HAProxy's sockets are: a socket's path may have 107 bytes, and a home's path may have more."""
    return Path(f"/tmp/rayloop-{pid}")


def prepare_environment(settings: Settings, folder: Path) -> None:
    """What Ray and its workers read from the environment; before Ray is imported."""
    environment = {
        "RAY_AUTH_MODE": settings.ray.auth_mode,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 lets every other process here go before a live request
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own ports on loopback only: nothing guards them
        **ingress_environment(settings),
        "PYTHONPATH": os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH")) if p),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if settings.serve.ingress == "haproxy":
        environment |= _haproxy_environment(folder)
    os.environ |= environment


def _haproxy_environment(folder: Path) -> dict[str, str]:
    """Ports and sockets of its own: other Ray Serves may run on this machine."""
    metrics, stats, fallback = free_ports(3)
    script = folder / "haproxy"
    write_haproxy_script(script, metrics, stats)
    sockets = sockets_folder(os.getpid())
    sockets.mkdir(mode=0o700, exist_ok=True)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(sockets / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(sockets),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(sockets / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "metrics.sock"),
    }


def _not_running(status: Any, names: list[str]) -> list[str]:
    """Applications that do not run yet.

    Raises:
        RuntimeError: one of them failed for good, with its reason.
    """
    waiting = []
    for name in names:
        application = status.applications.get(name)
        state = str(getattr(application, "status", "NOT_STARTED")).rpartition(".")[2]
        if state in FAILED:
            reason = str(application.message).strip().splitlines()[-1]
            raise RuntimeError(f"application {name} failed: {reason}")
        if state != "RUNNING":
            waiting.append(name)
    return waiting


def _family() -> list[psutil.Process]:
    """This process's descendants."""
    return psutil.Process().children(recursive=True)


def _still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running()]


def end_processes(processes: list[psutil.Process], within_s: float) -> None:
    """Ask each to end, then insist."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=within_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
