"""The router's added latency and throughput over a bare HTTP upstream, beside LiteLLM's proxy and vllm-router.

The same bytes are asked of the upstream directly, through Rayloop (key, sticky split, capture into the log,
fsync), through LiteLLM (key), and through vllm-router (Rust; it checks no key here and records nothing). In turn,
several rounds, medians. Run: `make bench NAME=router`.

The peers are installed by pip into environments of their own under `$RAYLOOP_BENCH_CACHE` (default
`~/.cache/rayloop-bench`). `--peers` says which (none: `--peers`), `--both-ingresses` measures Rayloop behind Ray
Serve's Python proxy too, `--seconds` and `--rounds` say how long.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.clock import now_us
from cluster.database import connect, write
from cluster.settings import load_settings
from cluster.tables import servables
from data.log import EventLog
from serve.ports import free_ports
from serve.routes import RouteKey, update_route
from tests.bench._http import TEXT

PROJECT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("RAYLOOP_BENCH_CACHE", Path.home() / ".cache" / "rayloop-bench"))
LITELLM_KEY = "sk-bench"
WORKLOADS = {
    "whole answer, 1 connection": ("whole", 1),
    "whole answer, 32 connections": ("whole", 32),
    "stream, 1 connection": ("stream", 1),
    "stream, 32 connections": ("stream", 32),
}


class Way:
    """One way to the upstream: its address, its key, the model's name there."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.url, self.key, self.model = url, key, model
        self.answered = 0
        """Requests so far."""

    def check(self) -> None:
        """The answer that comes back is the upstream's."""
        request = {"model": self.model, "messages": [{"role": "user", "content": "?"}], "user": "u"}
        headers = {"authorization": f"Bearer {self.key}"}
        answer = httpx.post(
            f"{self.url}/chat/completions", json=request, headers=headers, timeout=30
        ).raise_for_status()
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        self.answered += 1

    def load(self, kind: str, connections: int, seconds: float) -> dict[str, float]:
        """One measurement, from a process of its own."""
        arguments = [self.url, self.key, self.model, kind, str(connections), str(seconds)]
        command = [sys.executable, "-m", "tests.bench._http", "load", *arguments]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
        result: dict[str, float] = json.loads(done.stdout)
        assert result["failed"] == 0, f"{result['failed']} requests failed at {self.url}"
        self.answered += round(result["requests"])
        return result


@contextlib.contextmanager
def upstream() -> Iterator[str]:
    """The bare upstream in a process of its own."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "tests.bench._http", "serve", str(port)], cwd=PROJECT)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait_for(lambda: httpx.post(f"{url}/chat/completions", json={}).status_code == 200, 20)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def rayloop(upstream_url: str, home: Path, ingress: str, replicas: int = 1) -> Iterator[Way]:
    """Rayloop with everything on: keys, a sticky split, capture."""
    serve = {
        "port": 0, "applications": ["gateway"], "ingress": ingress, "router_replicas": replicas,
        "engines": {"local": {"base_url": upstream_url.removesuffix("/v1")}}, "allowed_hosts": ["127.0.0.1"],
        "open_metrics": True,
    }  # fmt: skip
    document = {
        "home": str(home), "learning": {"enabled": True}, "capture": {"enabled": True}, "serve": serve,
        "logging": {"level": "WARNING"},
    }  # fmt: skip
    home.mkdir(parents=True)
    config = home / "rayloop.yaml"
    config.write_text(yaml.safe_dump(document))
    database = connect(load_settings(config)[0])
    for version in ("triage/1", "triage/2"):
        row = {
            "version": version,
            "engine": "local",
            "model_name": version.replace("/", "-"),
            "base_model": "base",
        }
        with write(database).begin() as connection:
            connection.execute(servables.insert().values(**row, wanted=True, updated_at_us=now_us()))
    split = {"stable": "triage/1", "candidate": "triage/2", "share": 0.5}
    update_route(database, RouteKey("default", "triage"), split, writer="person:bench")
    up = [sys.executable, "-m", "cluster.cli", "up", "--json", "--config", str(config)]
    started = subprocess.run(up, cwd=PROJECT, capture_output=True, text=True, check=True)
    try:
        secret = (home / "run" / "api_key").read_text().strip()
        way = Way(json.loads(started.stdout)["urls"]["api"], secret, "triage")
        yield way
        _require_captured(EventLog(database), way, ingress)
    finally:
        subprocess.run(
            [sys.executable, "-m", "cluster.cli", "down", "--config", str(config)],
            cwd=PROJECT,
            capture_output=True,
        )
        database.dispose()


def _require_captured(log: EventLog, way: Way, ingress: str) -> None:
    """Capture is part of the work: wait until the log has settled, and hold it against what was answered."""
    before = -1
    while before != (before := log.last_seq()):
        time.sleep(1)
    kept = sum(1 for _ in log.scan(kinds=["interaction"]))
    text = httpx.get(f"{way.url.removesuffix('/v1')}/metrics", timeout=30).raise_for_status().text
    lost = next((s.value for s in _samples(text) if s.labels.get("outcome") == "lost"), 0.0)
    print(f"  rayloop ({ingress}): {kept} interactions in the log, {way.answered} answered", file=sys.stderr)
    assert lost == 0, f"{lost:g} interactions were lost"
    assert kept >= way.answered, f"{way.answered - kept} of {way.answered} interactions are not in the log"


def _samples(text: str) -> list[Sample]:
    families = text_string_to_metric_families(text)
    return [s for family in families for s in family.samples if s.name == "rayloop_captured_total"]


@contextlib.contextmanager
def litellm(upstream_url: str, folder: Path) -> Iterator[Way]:
    """LiteLLM's proxy with one worker, a key, nothing stored."""
    binary = _install("litellm", "litellm[proxy]")
    folder.mkdir(parents=True)
    config = folder / "litellm.yaml"
    model = {"model": "openai/base", "api_base": upstream_url, "api_key": "none"}
    settings = {
        "model_list": [{"model_name": "triage", "litellm_params": model}],
        "general_settings": {"master_key": LITELLM_KEY},
    }
    config.write_text(yaml.safe_dump(settings))
    (port,) = free_ports(1)
    command = [binary, "--config", config, "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"LITELLM_LOG": "ERROR"}
    with (folder / "litellm.log").open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(lambda: httpx.get(f"{url}/health/liveliness").status_code == 200, 120)
        yield Way(f"{url}/v1", LITELLM_KEY, "triage")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def vllm_router(upstream_url: str, folder: Path) -> Iterator[Way]:
    """vllm-router with one worker; what it sends on has the model's name as it came."""
    binary = _install("vllm-router", "vllm-router")
    port, metrics_port = free_ports(2)
    folder.mkdir(parents=True)
    command = [
        binary, "--worker-urls", upstream_url.removesuffix("/v1"), "--policy", "round_robin", "--host", "127.0.0.1",
        "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port),
        "--log-level", "error",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (folder / "vllm-router.log").open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, 60)
        yield Way(f"{url}/v1", "none", "triage")
    finally:
        process.terminate()
        process.wait()


def _install(name: str, requirement: str) -> Path:
    """The command of a peer, in an environment of its own."""
    environment = CACHE / name
    binary = environment / "bin" / name
    if not binary.exists():
        print(f"installing {requirement} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", requirement], check=True)
    return binary


PEERS = {"litellm": litellm, "vllm-router": vllm_router}


def _wait_for(happened: Any, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if happened():
                return
        if time.monotonic() > deadline:
            raise TimeoutError("a server did not start")
        time.sleep(0.2)


def measure(paths: dict[str, Way], rounds: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Workload -> path -> medians over the rounds; the paths take turns."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for path in paths.values():
        path.check()
        path.load("whole", 8, min(seconds, 2.0))  # warm
    for workload, (kind, connections) in WORKLOADS.items():
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        for _ in range(rounds):
            for name, path in paths.items():
                taken[name].append(path.load(kind, connections, seconds))
        results[workload] = {
            name: {key: statistics.median(t[key] for t in each) for key in ("rps", "p50_ms", "p99_ms")}
            for name, each in taken.items()
        }
    return results


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """A table, and the ratios against each peer."""
    for workload, by_path in results.items():
        print(f"\n{workload}")
        direct = by_path["direct"]["p50_ms"]
        for name, row in by_path.items():
            added = "" if name == "direct" else f"   added p50 {row['p50_ms'] - direct:7.2f} ms"
            print(
                f"  {name:<22}{row['rps']:9.0f} rps   p50 {row['p50_ms']:7.2f} ms   p99 {row['p99_ms']:7.2f} ms{added}"
            )
        for peer in PEERS.keys() & by_path.keys():
            for name in (n for n in by_path if n.startswith("rayloop")):
                ours, theirs = by_path[name], by_path[peer]
                latency = (theirs["p50_ms"] - direct) / max(ours["p50_ms"] - direct, 1e-6)
                print(
                    f"  {name} / {peer}: {ours['rps'] / theirs['rps']:.2f} x throughput, "
                    f"1/{latency:.2f} of the added p50"
                )


def main() -> None:
    """Start every path, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--both-ingresses", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayloop-bench-") as folder, contextlib.ExitStack() as stack:
        upstream_url = stack.enter_context(upstream())
        paths = {"direct": Way(upstream_url, "none", "base")}
        for ingress in ["haproxy", "proxy"] if options.both_ingresses else ["haproxy"]:
            paths[f"rayloop ({ingress})"] = stack.enter_context(rayloop(upstream_url, Path(folder) / ingress, ingress))
        for name in options.peers:
            paths[name] = stack.enter_context(PEERS[name](upstream_url, Path(folder) / name))
        show(measure(paths, options.rounds, options.seconds))


if __name__ == "__main__":
    main()
