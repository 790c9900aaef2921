"""vLLM as a child of a Serve replica: how long it takes to be up, how fast it is, and how soon it is back.

The replica is started through Ray Serve with a random model of the demo's size and one adapter. Measured: seconds
until the application runs; answers and tokens per second at 32 and 64 clients, base and adapter mixed; seconds from
killing vLLM's processes until the adapter answers again, with Serve restarting the replica and vLLM with it. In the
end the replica is stopped and no process of vLLM may be left.

Run: RAYLOOP_TEST_VLLM=.venv-vllm/bin/python python -m tests.bench.vllm [--requests 256]
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.database import connect
from cluster.model_files import adapter_digest, describe_base
from cluster.registry import Version
from cluster.runtime import ray_session
from cluster.settings import Settings, load_settings
from serve.engines.deployment import build
from serve.engines.token import engine_token
from serve.ports import free_ports
from serve.servables import wait_ready, want
from tests.serve.engines.models import build_adapter, build_base

PYTHON = os.environ.get("RAYLOOP_TEST_VLLM", ".venv-vllm/bin/python")
TOKENS = 24
READY_S = 600.0


def main() -> None:
    """Measure, print, and leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        base = build_base(home / "base", hidden=128, layers=4, heads=4, kv_heads=4)
        adapter = build_adapter(base, home / "adapter", seed=1, rank=16)
        engine = {"base_model": str(base), "kind": "vllm", "vllm": {"python": str(Path(PYTHON).absolute())}}
        settings, _ = load_settings(home=home / "home", engine=engine)
        with ray_session(settings, num_cpus=4):
            run(settings, adapter, options.requests)
    print("left of vLLM:", [p.pid for p in vllm_processes()] or "nothing")


def run(settings: Settings, adapter: Path, requests: int) -> None:
    """Everything with one application."""
    import ray.serve

    (port,) = free_ports(1)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    began = time.monotonic()
    ray.serve.run(build(settings), name="engine", route_prefix="/engine")
    print(f"up after {time.monotonic() - began:.1f} s")
    model = hold(settings, adapter)
    url = f"http://127.0.0.1:{port}/engine/v1/chat/completions"
    headers = {"authorization": f"Bearer {engine_token(settings)}"}
    for clients in (32, 64):
        seconds, failed = load(url, headers, ["base", model], requests, clients)
        rate = requests / seconds
        print(f"{clients} clients: {rate:.1f} answers/s, {rate * TOKENS:.0f} tokens/s, {failed} failed")
    print(f"killed; {model} answers again after {revive(url, headers, model):.1f} s")
    ray.serve.shutdown()
    deadline = time.monotonic() + 60
    while vllm_processes() and time.monotonic() < deadline:
        time.sleep(0.2)


def hold(settings: Settings, adapter: Path) -> str:
    """Have the engine load an adapter as a version; its served name."""
    location, revision = describe_base(str(settings.engine.base_model))
    version = Version(
        id="triage/1", model="triage", number=1, name="v1", base_model=location, adapter_path=adapter,
        adapter_sha256=adapter_digest(adapter), rank=16, dataset_hash=None, dataset_id=None, run_id=None,
        tags={"base_revision": revision}, aliases=(),
    )  # fmt: skip
    database = connect(settings)
    name = want(database, version, settings.engine.name).model_name
    wait_ready(database, version.id, READY_S)
    database.dispose()
    return name


def load(url: str, headers: dict[str, str], models: list[str], count: int, clients: int) -> tuple[float, int]:
    """Seconds for `count` answers, and how many failed."""
    numbers, failed = iter(range(count)), []
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(headers=headers, timeout=300) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                if http.post(url, json=request(models[number % len(models)], number)).status_code != 200:
                    failed.append(number)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began, len(failed)


def request(model: str, number: int) -> dict[str, Any]:
    """One chat of a fixed length."""
    messages = [{"role": "user", "content": f"alert {number}: disk full on host db-{number % 17}"}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "ignore_eos": True}


def revive(url: str, headers: dict[str, str], model: str) -> float:
    """Kill vLLM; seconds until the adapter answers again."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in vllm_processes():
        if process.pid in ours:
            process.kill()
    began = time.monotonic()
    while time.monotonic() < began + READY_S:
        try:
            if httpx.post(url, json=request(model, 0), headers=headers, timeout=30).status_code == 200:
                return time.monotonic() - began
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit("vLLM did not come back")


def vllm_processes() -> list[psutil.Process]:
    """Servers of vLLM that a replica started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "rayloop-vllm-" in line and "api_server" in line and "launcher.py" not in line:
            found.append(process)
    return found


if __name__ == "__main__":
    main()
