"""What users feel while parts of the live side break: long versions of `tests/serve/test_resilience.py`.

    make bench NAME=resilience                     every part, some twelve minutes
    python -m tests.bench.resilience killed --seconds 300 --rate 20
    python -m tests.bench.resilience overload | log_down | shadow

The router runs as it is deployed (`rayloop up`: Ray Serve behind its ingress), engines are processes of their own
that answer like one. No peer: these are bounds, not races. Each part prints its figures and fails when a bound of
the specification is broken.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import sqlalchemy as sa
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import Engine as Database

from cluster.database import connect
from cluster.settings import load_settings
from data.log import EventLog
from serve.routes import RouteKey, update_route
from tests.conftest import POSTGRES
from tests.serve.chaos import PROJECT, EngineProcess, Forwarder, Load, quantile, summary

KEY = RouteKey("default", "triage")
CAPACITY_SLOTS = 16
SLOWER = {0.5: 1.1, 0.95: 1.25}
"""Quantile of the live answer's time -> how many times slower copies may make it; noise is larger in the tail."""
COPIED = 0.9
"""Share of the requests whose copy must be answered, at a rate for which there is room."""


@dataclass
class Up:
    """What `rayloop up` started."""

    home: Path
    url: str
    secret: str
    database: Database

    def load(self, rate: float, **options: Any) -> Load:
        """Load that is to be run."""
        return Load(self.url, self.secret, rate, **options)

    def router_mb(self) -> float:
        """Resident memory of the router's replicas."""
        record = json.loads((self.home / "run" / "up.json").read_text())
        family = psutil.Process(record["pids"]["supervisor"]).children(recursive=True)
        routers = [p for p in family if "ServeReplica:gateway:Router" in " ".join(p.cmdline())]
        return sum(p.memory_info().rss for p in routers) / 2**20

    def interactions(self) -> dict[str, dict[str, Any]]:
        """All in the log."""
        return {str(r.event.interaction_id): r.event.body for r in EventLog(self.database).scan(kinds=["interaction"])}

    def wait_for(self, wanted: set[str], within_s: float) -> dict[str, dict[str, Any]]:
        """The interactions, when the wanted ones are there or the time is over."""
        deadline = time.monotonic() + within_s
        while not wanted <= (found := self.interactions()).keys() and time.monotonic() < deadline:
            time.sleep(0.5)
        return found


@contextlib.contextmanager
def rayloop(home: Path, serve: dict[str, Any], route: dict[str, Any], **document: Any) -> Iterator[Up]:
    """The live side with only a router, capture on."""
    serve = {
        "port": 0,
        "applications": ["gateway"],
        "allowed_hosts": ["127.0.0.1"],
        "dashboard": False,
        "open_metrics": True,
    } | serve
    everything = {
        "home": str(home), "learning": {"enabled": True}, "capture": {"enabled": True}, "serve": serve,
        "logging": {"level": "WARNING"},
    } | document  # fmt: skip
    home.mkdir(parents=True)
    config = home / "rayloop.yaml"
    config.write_text(yaml.safe_dump(everything))
    database = connect(load_settings(config)[0])
    update_route(database, KEY, route, writer="person:bench")
    command = [sys.executable, "-m", "cluster.cli"]
    started = subprocess.run(
        [*command, "up", "--json", "--config", str(config)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    try:
        secret = (home / "run" / "api_key").read_text().strip()
        yield Up(home, json.loads(started.stdout)["urls"]["api"], secret, database)
    finally:
        subprocess.run([*command, "down", "--config", str(config)], cwd=PROJECT, capture_output=True)
        database.dispose()


@contextlib.contextmanager
def engines(*made: EngineProcess) -> Iterator[None]:
    """Engines that end afterwards."""
    try:
        for engine in made:
            engine.wait_until_up()
        yield
    finally:
        for engine in made:
            engine.kill()


def killed(folder: Path, seconds: float, rate: float) -> list[str]:
    """A candidate with half of the users is killed once a second."""
    stable, candidate = EngineProcess(delay_ms=10), EngineProcess(delay_ms=10)
    declared = {
        "local": {"base_url": stable.url, "models": {"triage/1": "base"}},
        "canary": {"base_url": candidate.url, "models": {"triage/2": "c"}},
    }
    route = {"stable": "triage/1", "candidate": "triage/2", "share": 0.5, "experiment_id": "e1"}
    kills = 0
    with engines(stable, candidate), rayloop(folder / "killed", {"engines": declared}, route) as up:
        load = up.load(rate)
        worker = load.run_in_thread(seconds)
        while worker.is_alive():
            began = time.monotonic()
            candidate.kill()
            kills += 1
            time.sleep(0.2)
            candidate.start()
            time.sleep(max(0.0, began + 1 - time.monotonic()))
        bodies = up.wait_for({str(o.interaction_id) for o in load.outcomes if o.interaction_id}, 30)
    stable_bad = sum(o.status != 200 for o in load.outcomes if o.arm != "candidate")
    bad = sum(o.status != 200 for o in load.outcomes)
    fallen = [o for o in load.outcomes if o.arm == "candidate" and o.version == "triage/1"]
    unmarked = sum(
        bodies[str(o.interaction_id)]["assigned_version"] != "triage/2"
        or not bodies[str(o.interaction_id)]["flags"]["fallback"]
        for o in fallen
    )
    share = bad / len(load.outcomes)
    print(f"killed: {kills} kills in {seconds:g} s at {rate:g} requests/s: {json.dumps(summary(load))}")
    print(f"  failures seen by users {bad} = {share:.3%} (bound 0.1 %); of stable's users {stable_bad} (bound 0)")
    print(f"  answered by stable in the candidate's place {len(fallen)}, of them not so recorded {unmarked} (bound 0)")
    return _broken(
        ("a user of stable failed", stable_bad > 0),
        ("more than 0.1 % failed", share > 0.001),
        ("a fallback is not recorded", unmarked > 0 or not fallen),
    )


def overload(folder: Path, seconds: float, rate: float) -> list[str]:
    """Three times what the router may have in work."""
    engine = EngineProcess(delay_ms=400)
    capacity = CAPACITY_SLOTS / 0.4
    serve = {
        "engines": {"local": {"base_url": engine.url, "models": {"triage/1": "base"}}},
        "max_ongoing_requests": CAPACITY_SLOTS,
    }
    with engines(engine), rayloop(folder / "overload", serve, {"stable": "triage/1"}) as up:
        asyncio.run(up.load(capacity, streams=False).run(5))
        memory = [up.router_mb()]
        load = up.load(3 * capacity, streams=False)
        worker = load.run_in_thread(seconds)
        while worker.is_alive():
            worker.join(5)
            memory.append(up.router_mb())
        after = up.load(capacity / 4, streams=False)
        asyncio.run(after.run(4))
    seen = summary(load)
    grown = max(memory) - memory[0]
    print(f"overload: {3 * capacity:g} requests/s offered, capacity {capacity:g}: {json.dumps(seen)}")
    print(f"  memory of the router {memory[0]:.0f} MB, grown by {grown:.0f} MB; afterwards {dict(after.statuses())}")
    return _broken(
        ("an answer other than 200, 429 or 503, or none", bool(set(load.statuses()) - {200, 429, 503})),
        ("rejections take more than 1 s", seen["refused_p99_s"] > 1),
        ("memory is not flat", grown > 50),
        ("it does not recover", set(after.statuses()) != {200}),
    )


def log_down(folder: Path, seconds: float, rate: float) -> list[str]:
    """The database is cut off in the middle; PostgreSQL through a relay."""
    name = f"rayloop_bench_{int(time.time())}"
    engine = EngineProcess(delay_ms=5)
    serve = {"engines": {"local": {"base_url": engine.url, "models": {"triage/1": "base"}}}}
    with psycopg.connect(POSTGRES, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        relay: Forwarder | None = None
        try:
            url = sa.make_url(POSTGRES).set(database=name)
            relay = Forwarder(url.host or "127.0.0.1", url.port or 5432)
            through = url.set(host="127.0.0.1", port=relay.port).render_as_string(hide_password=False)
            with engines(engine), rayloop(
                folder / "log", serve, {"stable": "triage/1"}, database={"url": through}
            ) as up:  # fmt: skip
                load = up.load(rate)
                worker = load.run_in_thread(seconds + 20)
                time.sleep(10)
                relay.cut()
                time.sleep(seconds)
                relay.mend()
                worker.join()
                wanted = {str(o.interaction_id) for o in load.outcomes}
                began = time.monotonic()
                found = up.wait_for(wanted, 60)
                home_s = time.monotonic() - began
        finally:
            if relay is not None:
                relay.close()
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    failed = sum(o.status != 200 for o in load.outcomes)
    missing = len(wanted - found.keys())
    print(f"log_down: {seconds:g} s without the log at {rate:g} requests/s: {json.dumps(summary(load))}")
    print(
        f"  failed {failed} (bound 0); records missing {missing} of {len(wanted)} (bound 0), home after {home_s:.1f} s"
    )
    return _broken(("a request failed", failed > 0), ("a record is missing", missing > 0))


def shadow(folder: Path, seconds: float, rate: float) -> list[str]:
    """The same load without and with copies to an engine that takes ten times as long; in turn, three times."""
    live, slow = EngineProcess(delay_ms=20), EngineProcess(delay_ms=200)
    declared = {
        "local": {"base_url": live.url, "models": {"triage/1": "base"}},
        "later": {"base_url": slow.url, "models": {"triage/2": "s"}},
    }
    copies = {"enabled": True, "max_concurrent": 128}  # more than are ever under way: here all are wanted
    taken: dict[str, list[float]] = {"without": [], "with": []}
    with (
        engines(live, slow),
        rayloop(folder / "shadow", {"engines": declared}, {"stable": "triage/1"}, shadow=copies) as up,
    ):
        asyncio.run(up.load(rate).run(3))
        for _ in range(3):
            for name, version in (("without", None), ("with", "triage/2")):
                update_route(up.database, KEY, {"shadow": version}, writer="person:bench")
                time.sleep(1)
                load = up.load(rate)
                asyncio.run(load.run(seconds / 6))
                assert set(load.statuses()) == {200}
                taken[name] += [o.seconds for o in load.outcomes]
        outcomes = shadowed(f"{up.url.removesuffix('/v1')}/metrics", len(taken["with"]))
    answered = outcomes.get("answered", 0.0) / len(taken["with"])
    ratio = {q: quantile(taken["with"], q) / quantile(taken["without"], q) for q in (0.5, 0.95)}
    for name, values in taken.items():
        print(
            f"shadow: {name:<8} p50 {1000 * quantile(values, 0.5):.1f} ms  p95 {1000 * quantile(values, 0.95):.1f} ms"
        )
    print(f"  with / without: p50 {ratio[0.5]:.3f} (bound {SLOWER[0.5]}), p95 {ratio[0.95]:.3f} (bound {SLOWER[0.95]})")
    print(
        f"  copies by outcome {outcomes}, answered {answered:.1%} of {len(taken['with'])} requests (bound {COPIED:.0%})"
    )
    return _broken(
        *((f"the live answer's p{100 * q:g} is slower", ratio[q] > most) for q, most in SLOWER.items()),
        ("too few copies were answered", answered < COPIED),
    )


def shadowed(metrics_url: str, copies: int, within_s: float = 20.0) -> dict[str, float]:
    """Copies by outcome, once so many have one or the time is over."""
    deadline = time.monotonic() + within_s
    while True:
        families = text_string_to_metric_families(httpx.get(metrics_url).text)
        samples = [s for family in families for s in family.samples if s.name == "rayloop_shadowed_total"]
        found = {s.labels["outcome"]: s.value for s in samples}
        if sum(found.values()) >= copies or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _broken(*bounds: tuple[str, bool]) -> list[str]:
    return [name for name, is_broken in bounds if is_broken]


PARTS = {
    "killed": (killed, 300, 20),
    "overload": (overload, 60, 0),
    "log_down": (log_down, 60, 40),
    "shadow": (shadow, 60, 20),
}
"""How each part is run, for how many seconds, at how many requests a second (`overload` knows its own rate)."""


def main() -> int:
    """Run the named parts, or all; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rate", type=float)
    options = parser.parse_args()
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rayloop-bench-") as folder:
        for name in options.parts or PARTS:
            run, seconds, rate = PARTS[name]
            broken += [
                f"{name}: {what}" for what in run(Path(folder), options.seconds or seconds, options.rate or rate)
            ]
    for line in broken:
        print(f"BROKEN {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
