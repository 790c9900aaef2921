"""From an adapter on disk to the candidate's first token, against redeploying an application with `serve.run`.

Ours: the adapter is wanted (a row), every engine replica loads and checks it, the route gets a share of 1 (a
compare-and-swap), and a client that asks all the time sees the candidate. The base stays loaded and keeps
answering. The peer is what Ray Serve offers without that: an application with base and adapter, deployed again
with `ray.serve.run` whenever the adapter changes. The same tiny random model and adapters on both sides; ours
under background load, of which no request may fail.

Run: `make bench NAME=canary`, or python -m tests.bench.canary [--rounds 5].
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.database import connect
from cluster.model_files import adapter_digest, describe_base
from cluster.registry import Version
from cluster.settings import load_settings
from serve.routes import RouteKey, update_route
from serve.servables import wait_ready, want
from tests.serve.chaos import PROJECT, Load

KEY = RouteKey("default", "triage")
MESSAGES = [{"role": "user", "content": "disk full on host db-7"}]
TARGET = 20
LOAD_PER_S = 5


def version_of(base: Path, number: int, adapter: Path | None) -> Version:
    """A version as the registry would describe it."""
    location, revision = describe_base(base)
    digest = adapter_digest(adapter) if adapter else None
    return Version(
        id=f"triage/{number}", model="triage", number=number, name=f"v{number}", base_model=location,
        adapter_path=adapter, adapter_sha256=digest, rank=4, dataset_hash=None, dataset_id=None, run_id=None,
        tags={"base_revision": revision}, aliases=(),
    )  # fmt: skip


def ours(folder: Path, base: Path, adapters: list[Path]) -> tuple[list[float], int, int]:
    """Seconds of each round, requests of the background load, and how many of them failed."""
    config = folder / "rayloop.yaml"
    serve = {"port": 0, "applications": ["gateway", "engine"], "dashboard": False}
    document = {"home": str(folder / "home"), "serve": serve, "engine": {"base_model": str(base)}}
    config.write_text(yaml.safe_dump(document | {"logging": {"level": "WARNING"}}))
    settings, _ = load_settings(config)
    database = connect(settings)
    want(database, version_of(base, 1, None), "local")
    update_route(database, KEY, {"stable": "triage/1"}, writer="person:bench")
    command = [sys.executable, "-m", "cluster.cli"]
    started = subprocess.run(
        [*command, "up", "--json", "--config", str(config)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    try:
        url = json.loads(started.stdout)["urls"]["api"]
        secret = (settings.home / "run" / "api_key").read_text().strip()
        wait_ready(database, "triage/1", 60)
        load = Load(url, secret, LOAD_PER_S, streams=False)
        worker = load.run_in_thread(6.0 * len(adapters))
        taken = [
            first_token_s(database, url, secret, version_of(base, number, adapter))
            for number, adapter in enumerate(adapters, start=2)
        ]
        worker.join()
        return taken, len(load.outcomes), sum(o.status != 200 for o in load.outcomes)
    finally:
        subprocess.run([*command, "down", "--config", str(config)], cwd=PROJECT, capture_output=True)
        database.dispose()


def first_token_s(database: Any, url: str, secret: str, version: Version) -> float:
    """Make a version the candidate of everybody; seconds until somebody sees its first token."""
    request = {"model": "triage", "messages": MESSAGES, "max_tokens": 4, "stream": True, "user": "ann"}
    with httpx.Client(headers={"authorization": f"Bearer {secret}"}, timeout=30) as client:
        began = time.perf_counter()
        want(database, version, "local")
        wait_ready(database, version.id, 60, poll_s=0.02)
        update_route(database, KEY, {"candidate": version.id, "share": 1.0}, writer="person:bench")
        while True:
            with client.stream("POST", f"{url}/chat/completions", json=request) as response:
                next(response.iter_bytes())
                seconds = time.perf_counter() - began
                if response.headers.get("x-rayloop-version") == version.id:
                    return seconds
            time.sleep(0.02)


class PeerModel:
    """Base and adapter in one replica, as a deployment that is deployed again for each adapter."""

    def __init__(self, base: str, adapter: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._adapter = adapter
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()

    async def __call__(self, request: Any) -> dict[str, str]:
        """One token, and which adapter it comes from."""
        asked = await request.json()
        ids = self._tokenizer.apply_chat_template(asked["messages"], return_tensors="pt", return_dict=True)
        tokens = await asyncio.to_thread(self._model.generate, **ids, max_new_tokens=1)
        return {"adapter": self._adapter, "token": str(int(tokens[0, -1]))}


def peer(base: Path, adapters: list[Path], port: int) -> list[float]:
    """Seconds of each redeployment until the new adapter's first token; the first deployment is not counted."""
    import ray
    import ray.serve

    os.environ["PYTHONPATH"] = str(PROJECT)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment: Any = ray.serve.deployment(PeerModel)
    taken = []
    try:
        for adapter in adapters:
            began = time.perf_counter()
            ray.serve.run(deployment.bind(str(base), str(adapter)), name="peer", route_prefix="/")
            while True:
                answer = httpx.post(f"http://127.0.0.1:{port}/", json={"messages": MESSAGES}, timeout=60)
                if answer.status_code == 200 and answer.json()["adapter"] == str(adapter):
                    break
                time.sleep(0.02)
            taken.append(time.perf_counter() - began)
    finally:
        ray.serve.shutdown()
        ray.shutdown()
    return taken[1:]


def main() -> int:
    """Both sides, medians and the ratio; 1 when a request of the load failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from serve.ports import free_ports
    from tests.serve.engines.models import build_adapter, build_base

    with tempfile.TemporaryDirectory(prefix="rayloop-bench-") as name:
        folder = Path(name)
        base = build_base(folder / "base")
        adapters = [build_adapter(base, folder / f"a{n}", seed=n + 1) for n in range(options.rounds + 1)]
        mine, asked, failed = ours(folder, base, adapters[1:])
        theirs = peer(base, adapters, free_ports(1)[0])
    ratio = statistics.median(theirs) / statistics.median(mine)
    print(f"rayloop     median {statistics.median(mine):6.2f} s  {[round(s, 2) for s in mine]}")
    print(f"serve.run   median {statistics.median(theirs):6.2f} s  {[round(s, 2) for s in theirs]}")
    print(f"1/{ratio:.1f} of the time (target 1/{TARGET}); {failed} of {asked} background requests failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
