"""The Ray session of a command: started on this machine, or joined where one runs.

`with ray_session(settings): …` is the only place that calls `ray.init` and `ray.shutdown`. A cluster is
joined when `ray.address` or `RAY_ADDRESS` names one (a submitted job always has it), else one is started
on free ports and ended with the block. A block inside another uses the outer session.

While the session lives, a thread looks for requests that wait for resources and says which is short: a
Ray Data stage that cannot be placed would otherwise hang in silence.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import UnavailableError
from cluster.settings import Settings

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = [
    ".venv",
    ".rayloop",
    ".git",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "mlruns",
    "**/__pycache__",
]
HERE = ("auto", "local", "127.0.0.1", "localhost")
INLINED_BYTES = 100_000
"""Results of one task that travel in its answer and stay on the heap of the process that asked, until nobody needs
them. Ray's ten million would let a shuffle of small pieces fill that heap; what is more goes to the object store."""
Shape = tuple[tuple[str, float], ...]
"""A resource request: sorted (resource, amount) pairs."""


@dataclass(frozen=True, slots=True)
class RaySession:
    """The cluster that the block runs on."""

    address: str
    """Address of its control store, `host:port`."""
    started: bool
    """True when this block started it, so leaving the block ends it."""


@contextmanager
def ray_session(settings: Settings, *, num_cpus: int | None = None) -> Iterator[RaySession]:
    """A Ray cluster for the block: the current one, the one named by an address, or a local one.

    Args:
        settings: `settings.ray` says which cluster, or how large a local one is.
        num_cpus: logical CPUs of a cluster started here, instead of the setting.

    Raises:
        UnavailableError: the named cluster does not answer, or none can be started.
    """
    address = settings.ray.address or os.environ.get("RAY_ADDRESS")
    _set_auth_mode(settings, joining=address is not None)
    _set_loopback(address)
    import ray

    if ray.is_initialized():
        yield RaySession(ray.get_runtime_context().gcs_address, started=False)
        return
    if address:
        _check_reachable(address, settings.ray.connect_timeout_s)
        _follow_to_loopback(address, settings.ray.connect_timeout_s)
    with _keeping_to_loopback() if address is None else nullcontext():
        _init(_join_arguments(address) if address else _start_arguments(settings, num_cpus), address)
        session = RaySession(ray.get_runtime_context().gcs_address, started=address is None)
        watch = SchedulingWatch(session.address, settings.ray.scheduling_warning_s)
        watch.start()
        try:
            yield session
        finally:
            watch.stop()
            ray.shutdown()


def starts_here(settings: Settings) -> bool:
    """Whether `ray_session` starts a cluster on this machine instead of joining one; it will not grow."""
    return not (settings.ray.address or os.environ.get("RAY_ADDRESS"))


def _set_auth_mode(settings: Settings, *, joining: bool) -> None:
    """Ray defaults to token authentication and then waits a minute for a token nobody made."""
    if joining:
        os.environ.setdefault("RAY_AUTH_MODE", settings.ray.auth_mode)
    else:
        os.environ["RAY_AUTH_MODE"] = settings.ray.auth_mode


def _set_loopback(address: str | None) -> None:
    """A cluster of `rayloop up` listens on loopback only; Ray would look for it at this machine's own address."""
    if address and address.startswith(("127.0.0.1:", "localhost:")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def _keeping_to_loopback() -> Iterator[None]:
    """A cluster that is started here serves this process alone, so nothing of it listens for other machines."""
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_arguments(settings: Settings, num_cpus: int | None) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": num_cpus or settings.ray.num_cpus,
        "object_store_memory": settings.ray.object_store_mb * 2**20,
        "include_dashboard": False,
        "_system_config": system_config(settings),
    }


def system_config(settings: Settings) -> dict[str, Any]:
    """Ray's own settings for a cluster that is started here."""
    return {"max_io_workers": settings.ray.io_workers, "task_rpc_inlined_bytes_limit": INLINED_BYTES}


def _join_arguments(address: str) -> dict[str, Any]:
    """A cluster elsewhere gets this code sent; a submitted job and this machine have it."""
    arguments: dict[str, Any] = {"address": address}
    host = address.removeprefix("ray://").rsplit(":", 1)[0]
    if host not in HERE and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        arguments["runtime_env"] = {"working_dir": str(PROJECT), "excludes": NOT_SHIPPED}
    return arguments


def _check_reachable(address: str, timeout_s: float) -> None:
    """Ray itself tries a dead address for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # `auto`: Ray looks for a cluster on this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise _unreachable(address, error) from None


def _follow_to_loopback(address: str, timeout_s: float) -> None:
    """Join a cluster that listens on loopback only, as `rayloop up` starts it.

    Ray turns 127.0.0.1 into this machine's own address, where nothing listens then, unless it is told
    that there are no other machines. It reads that when it is imported, which may be long ago.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return
    from ray._private import ray_constants, services

    try:
        socket.create_connection((services.get_node_ip_address(), int(port)), timeout_s).close()
    except OSError:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False


def _unreachable(address: str, error: Exception) -> UnavailableError:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UnavailableError(
        f"Ray cluster {address} does not answer ({cause}); start it or set `ray.address` in rayloop.yaml"
    )


def _init(arguments: Mapping[str, Any], address: str | None) -> None:
    import ray

    _keep_messages_off_stdout()
    try:
        with _keeping_sigterm():
            ray.init(**arguments, log_to_driver=False, logging_level=logging.WARNING, configure_logging=False)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        if address:
            raise _unreachable(address, error) from None
        raise UnavailableError(f"Ray cannot start here ({error}); see /tmp/ray/session_latest/logs") from None


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, to print a stack trace of its own; whoever handled it before goes on to."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _keep_messages_off_stdout() -> None:
    """Ray prints the raylet's warnings on standard output, where a command's JSON belongs; `log_to_driver` does
    not govern them."""
    import ray._private.worker as worker

    printed = worker.print_to_stdstream
    if getattr(printed, "to_stderr", False):
        return

    def to_stderr(data: dict[str, Any], ignore_prefix: bool) -> None:
        printed({**data, "is_err": True}, ignore_prefix)

    to_stderr.to_stderr = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = to_stderr


@dataclass
class SchedulingWatch:
    """A thread that warns once for each request left waiting longer than `limit_s` while none of its like began."""

    address: str
    limit_s: float
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="scheduling-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has ended.

        However long its last question takes: a thread that is still inside Ray's C++ code when the
        interpreter ends would abort the process.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        since: dict[tuple[Shape, int], float] = {}
        warned: set[Shape] = set()
        while not self._stop.wait(self.limit_s / 3):
            try:
                state = _resource_state(self.address)
            except Exception as error:  # the control store may be going down with the session
                log.debug("cannot read the cluster's resource state: %s", error)
                continue
            now = time.monotonic()
            waiting = {(_shape(r.request.resources_bundle), r.count) for r in state.pending_resource_requests}
            since = {request: since.get(request, now) for request in waiting}  # fewer than before: they get their turn
            for (shape, _), begun in since.items():
                if now - begun >= self.limit_s and shape not in warned:
                    warned.add(shape)
                    log.warning("%s", waiting_message(shape, _totals(state), now - begun))


def waiting_message(shape: Shape, totals: Mapping[str, tuple[float, float]], waited_s: float) -> str:
    """One line that names what is short. `totals` maps a resource to (free, in the whole cluster)."""
    parts = []
    for name, amount in shape:
        free, total = totals.get(name, (0.0, 0.0))
        if amount > free:
            parts.append(f"{name} {amount:g} asked, {free:g} free of {total:g}")
    short = "; ".join(parts) or "free resources are on different nodes"
    never = any(amount > totals.get(name, (0.0, 0.0))[1] for name, amount in shape)
    remedy = (
        "it can never be placed: raise `ray.num_cpus` or add nodes" if never else "the work waits until some are free"
    )
    return f"a task has waited {waited_s:.0f} s for resources ({short}); {remedy}"


def _resource_state(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    return get_cluster_resource_state(GcsClient(address=address))


def _shape(bundle: Mapping[str, float]) -> Shape:
    return tuple(sorted(bundle.items()))


def _totals(state: Any) -> dict[str, tuple[float, float]]:
    totals: dict[str, tuple[float, float]] = {}
    for node in state.node_states:
        for name, total in node.total_resources.items():
            free, known = totals.get(name, (0.0, 0.0))
            totals[name] = (free + node.available_resources.get(name, 0.0), known + total)
    return totals
