"""Ingestion over HTTP, acknowledged after fsync, against PostgreSQL with one INSERT a row.

    python -m tests.bench.ingestion [--rounds 5] [--events 32000] [--router http://127.0.0.1:8000 --key rl-…]

Ours: 32 connections send bodies of 100 feedback items to `/v1/feedback`; every item is parsed, checked,
made idempotent by its id, given a reward and a pseudonym, and acknowledged when it is on disk. Measured on
SQLite and on PostgreSQL, through a small HTTP server around `data.intake.batches`, or through a running router.

Peer: the same events as rows of one PostgreSQL table with a unique event id, one INSERT and one commit a
row, from 32 connections in four processes (psycopg). Client and server share the machine in both cases.
Both sides must end with exactly the events that were sent.

PostgreSQL is found at RAYLOOP_TEST_POSTGRES, else at 127.0.0.1:5432.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psycopg
import sqlalchemy as sa
from aiohttp import web

from cluster.database import connect
from cluster.settings import Settings, load_settings
from data.group_commit import GroupCommit
from data.intake.batches import Intake, read_items
from data.intake.items import Identity
from data.log import EventLog

POSTGRES = os.environ.get("RAYLOOP_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")
CLIENTS = 32
ITEMS_PER_BODY = 100
PEER_PROCESSES = 4
START_TIMEOUT_S = 120
ON = {"learning": {"enabled": True}, "feedback": {"explicit": True, "implicit": True}}


def make_items(count: int) -> list[dict[str, Any]]:
    """Thumbs of two thousand users about distinct answers, each with an id of its own."""
    return [
        {
            "event_id": str(uuid.uuid4()),
            "interaction_id": str(uuid.uuid4()),
            "type": "thumbs_up" if n % 3 else "thumbs_down",
            "user": f"user-{n % 2000}",
            "session": f"session-{n % 500}",
        }
        for n in range(count)
    ]


# --- ours


async def serve(url: str, home: str) -> None:
    """The intake behind a small HTTP server; prints its port."""
    settings = load_settings(home=home, database={"url": url}, **ON)[0]
    sys.setswitchinterval(settings.serve.switch_interval_ms / 1000)  # as a router's process does
    intake = Intake(GroupCommit(EventLog(connect(settings)), settings.log), settings)
    identity = Identity("default", "default")

    async def feedback(request: web.Request) -> web.Response:
        results = await intake.take_in(read_items(await request.read(), settings), "feedback", identity)
        document = {"object": "list", "data": [result.as_dict() for result in results]}
        return web.Response(body=orjson.dumps(document), content_type="application/json")

    app = web.Application(client_max_size=2**22)
    app.router.add_post("/v1/feedback", feedback)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await web.SockSite(runner, listener).start()
        print(listener.getsockname()[1], flush=True)
        await asyncio.Event().wait()


async def send(base_url: str, bodies: list[bytes], key: str | None) -> float:
    """Send all bodies over 32 connections; seconds until the last acknowledgement."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    waiting = iter(bodies)

    async def client(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            async with session.post(f"{base_url}/v1/feedback", data=body, headers=headers) as response:
                answer = orjson.loads(await response.read())
                if response.status != 200 or any(r["status"] != "accepted" for r in answer["data"]):
                    raise RuntimeError(f"{response.status}: {answer}")

    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(connector=connector) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return time.perf_counter() - start


def to_bodies(items: list[dict[str, Any]]) -> list[bytes]:
    """The items as request bodies."""
    starts = range(0, len(items), ITEMS_PER_BODY)
    return [orjson.dumps({"items": items[start : start + ITEMS_PER_BODY]}) for start in starts]


def measure_ours(url: str, items: list[dict[str, Any]], home: Path) -> float:
    """Events a second through the small HTTP server, on a fresh database."""
    command = [sys.executable, "-m", "tests.bench.ingestion", "--serve", url, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            seconds = asyncio.run(send(f"http://127.0.0.1:{port}", to_bodies(items), None))
        finally:
            server.kill()
    check_log(load_settings(home=home, database={"url": url})[0], items)
    return len(items) / seconds


def check_log(settings: Settings, items: list[dict[str, Any]]) -> None:
    """The log holds exactly what was sent."""
    engine = connect(settings)
    kept = [recorded.event.event_id for recorded in EventLog(engine).scan()]
    engine.dispose()
    if sorted(kept) != sorted(item["event_id"] for item in items):
        raise RuntimeError(f"{len(items)} events were sent, the log holds {len(kept)}")


# --- the peer


def insert_rows(url: str, items: list[dict[str, Any]], threads: int, go: Any) -> None:
    """One process of the peer: each thread inserts and commits its items one by one."""
    from threading import Thread

    statement = (
        "INSERT INTO feedback (event_id, tenant, kind, user_id, session_id, interaction_id, body) "
        "VALUES (%s, 'default', 'feedback', %s, %s, %s, %s)"
    )
    connections = [psycopg.connect(url, autocommit=True) for _ in range(threads)]

    def work(number: int) -> None:
        for item in items[number::threads]:
            body = orjson.dumps({"type": item["type"]}).decode()
            values = (item["event_id"], item["user"], item["session"], item["interaction_id"], body)
            connections[number].execute(statement, values)

    go.wait(START_TIMEOUT_S)
    workers = [Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measure_peer(url: str, items: list[dict[str, Any]]) -> float:
    """Rows a second with one INSERT and one commit a row."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE feedback (event_id text PRIMARY KEY, tenant text NOT NULL, kind text NOT NULL, "
            "user_id text, session_id text, interaction_id text, body jsonb NOT NULL, "
            "recorded_at timestamptz NOT NULL DEFAULT now())"
        )
        context = get_context("spawn")
        go = context.Barrier(PEER_PROCESSES + 1)
        workers = [
            context.Process(target=insert_rows, args=(url, items[n::PEER_PROCESSES], CLIENTS // PEER_PROCESSES, go))
            for n in range(PEER_PROCESSES)
        ]
        for worker in workers:
            worker.start()
        go.wait(START_TIMEOUT_S)
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - start
        (count,) = admin.execute("SELECT count(*) FROM feedback").fetchone() or (0,)
    if count != len(items):
        raise RuntimeError(f"{len(items)} rows were sent, the table holds {count}")
    return len(items) / seconds


# --- the comparison


@contextlib.contextmanager
def postgres_database() -> Iterator[str]:
    """URL of a fresh database, dropped afterwards."""
    name = f"rayloop_bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(POSTGRES, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield sa.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def one_round(events: int, peer_events: int) -> dict[str, float]:
    """Each side once, in turn, on fresh databases."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        rates["ours, SQLite"] = measure_ours(f"sqlite:///{home}/log.db", make_items(events), home)
        with postgres_database() as url:
            rates["ours, PostgreSQL"] = measure_ours(url, make_items(events), home)
        with postgres_database() as url:
            rates["INSERT per row"] = measure_peer(url, make_items(peer_events))
    return rates


def compare(rounds: int, events: int, peer_events: int) -> None:
    """Alternate the sides and print medians and ratios."""
    results = [one_round(events, peer_events) for _ in range(rounds)]
    medians = {name: statistics.median(r[name] for r in results) for name in results[0]}
    peer = medians["INSERT per row"]
    print(f"{rounds} rounds of {events} events ({peer_events} for the peer), {os.cpu_count()} cores")
    print(f"{'side':<18} {'events/s':>10} {'slowest':>10} {'fastest':>10} {'ratio':>7}")
    for name, median in medians.items():
        rates = [r[name] for r in results]
        print(f"{name:<18} {median:>10,.0f} {min(rates):>10,.0f} {max(rates):>10,.0f} {median / peer:>6.1f}x")
    print("target: 10x")


def through_router(base_url: str, key: str, rounds: int, events: int) -> None:
    """A running router instead of the small server; its database is left with the events."""
    ours, peers = [], []
    for _ in range(rounds):
        ours.append(events / asyncio.run(send(base_url, to_bodies(make_items(events)), key)))
        with postgres_database() as url:
            peers.append(measure_peer(url, make_items(events // 5)))
    print(f"router {statistics.median(ours):,.0f} events/s, INSERT per row {statistics.median(peers):,.0f}")
    print(f"ratio {statistics.median(ours) / statistics.median(peers):.1f}x (target 10x)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=32_000)
    parser.add_argument("--peer-events", type=int, default=6_400)
    parser.add_argument("--router", help="base URL of a running router")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(*arguments.serve))
    elif arguments.router:
        through_router(arguments.router, arguments.key, arguments.rounds, arguments.events)
    else:
        compare(arguments.rounds, arguments.events, arguments.peer_events)


if __name__ == "__main__":
    main()
