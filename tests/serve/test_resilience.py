"""A router when what it stands on breaks under load; `tests/bench/resilience.py` does the same for minutes."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from data.log import EventLog
from tests.serve.chaos import BROKEN, NO_ANSWER, EngineProcess, Forwarder, Load
from tests.serve.conftest import Live, live_router


@contextmanager
def running(*engines: EngineProcess) -> Iterator[None]:
    try:
        for engine in engines:
            engine.wait_until_up()
        yield
    finally:
        for engine in engines:
            engine.kill()


@contextmanager
def router(home: Path, **overrides: object) -> Iterator[Live]:
    yield from live_router(home, **overrides)


def interactions(live: Live) -> dict[str, dict[str, object]]:
    found = EventLog(live.database).scan(kinds=["interaction"])
    return {str(r.event.interaction_id): r.event.body for r in found}


def wait_for(live: Live, wanted: set[str], within_s: float = 60) -> dict[str, dict[str, object]]:
    """The interactions in the log, once all the wanted ones are there."""
    deadline = time.monotonic() + within_s
    while not wanted <= (found := interactions(live)).keys():
        assert time.monotonic() < deadline, f"{len(wanted - found.keys())} of {len(wanted)} are missing"
        time.sleep(0.2)
    return found


def test_candidate_that_is_killed_again_and_again_is_not_felt(tmp_path: Path) -> None:
    candidate = EngineProcess(delay_ms=2)
    engines = {"local": {}, "canary": {"base_url": candidate.url, "models": {"triage/3": "c"}}}
    with (
        running(candidate),
        router(tmp_path / "home", serve={"engines": engines, "allowed_hosts": ["127.0.0.1"]}) as live,
    ):
        live.route(candidate="triage/3", share=0.5)
        load = Load(f"{live.url}/v1", live.secret, rate=20)
        worker = load.run_in_thread(5)
        while worker.is_alive():
            candidate.kill()
            time.sleep(0.5)
            candidate.start()
            time.sleep(0.5)
        stable = [o for o in load.outcomes if o.arm == "stable"]
        assert {o.status for o in stable} == {200}
        assert len(stable) > 20
        broken = [o for o in load.outcomes if o.status != 200]
        assert all(o.is_stream and o.status == BROKEN for o in broken)  # began on the candidate: nobody can stand in
        assert len(broken) <= 4
        bodies = wait_for(live, {str(o.interaction_id) for o in load.outcomes})
        fallen = [o for o in load.outcomes if o.arm == "candidate" and o.version == "triage/1"]
        assert fallen
        for outcome in fallen:
            body = bodies[str(outcome.interaction_id)]
            assert (body["arm"], body["assigned_version"]) == ("candidate", "triage/3")
            assert body["flags"]["fallback"] is True  # type: ignore[index]
        for outcome in broken:
            assert bodies[str(outcome.interaction_id)]["flags"]["error"]  # type: ignore[index]


def test_three_times_the_capacity_is_answered_or_refused_and_over_at_once(tmp_path: Path) -> None:
    engine = EngineProcess(delay_ms=200)
    limits = {"max_ongoing_requests": 8, "engines": {"local": {"base_url": engine.url}}, "allowed_hosts": ["127.0.0.1"]}
    with running(engine), router(tmp_path / "home", serve=limits) as live:
        load = Load(f"{live.url}/v1", live.secret, rate=120, streams=False)  # 8 at a time, 0.2 s each: 40 a second
        asyncio.run(load.run(3))
        statuses = load.statuses()
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 20
        after = Load(f"{live.url}/v1", live.secret, rate=4)
        asyncio.run(after.run(1))
        assert set(after.statuses()) == {200}


@pytest.mark.postgres
def test_log_that_is_away_costs_no_request_and_no_record(tmp_path: Path, postgres_url: str) -> None:
    url = sa.make_url(postgres_url)
    relay = Forwarder(url.host or "127.0.0.1", url.port or 5432)
    through = url.set(host="127.0.0.1", port=relay.port).render_as_string(hide_password=False)
    try:
        with router(tmp_path / "home", database={"url": through}) as live:
            load = Load(f"{live.url}/v1", live.secret, rate=40)
            worker = load.run_in_thread(6)
            time.sleep(1)
            relay.cut()
            time.sleep(3)
            relay.mend()
            worker.join()
            assert set(load.statuses()) == {200}
            assert NO_ANSWER not in load.statuses()
            wanted = {str(o.interaction_id) for o in load.outcomes}
            assert len(wanted) == 240
            assert wanted == wait_for(live, wanted).keys()
            assert relay.refused > 0
    finally:
        relay.close()
