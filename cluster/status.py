"""What `rayloop status` shows: the switches, what runs, who serves what, and what is under way.

Everything is read from the settings, the run record of `rayloop up` and the database, so it answers
quickly and without a Ray session, also while the live side is down.
"""

import json
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import now_us, to_iso
from cluster.database import connect
from cluster.errors import UnavailableError
from cluster.settings import Settings
from cluster.tables import dead_letters, events, outlets, rollouts, routes, servable_replicas, training_jobs

SWITCH_SECTIONS = (
    "learning", "capture", "feedback", "trajectory_evaluation", "trajectory_feedback_loop", "shadow", "automation",
)  # fmt: skip
FINAL_ROLLOUT_STATES = ("promoted", "rolled_back", "failed")


def collect(settings: Settings) -> dict[str, Any]:
    """The whole picture as plain data. A database that does not answer is reported, not raised."""
    picture: dict[str, Any] = {"switches": switches(settings), "live": live_side(settings)}
    try:
        engine = connect(settings)
    except UnavailableError as error:
        return picture | {"database": {"ok": False, "reason": str(error)}}
    try:
        return picture | {"database": {"ok": True}} | _from_database(engine)
    finally:
        engine.dispose()


def switches(settings: Settings) -> dict[str, bool]:
    """Every switch of the configuration by its dotted name."""
    return {
        f"{section}.{name}": value
        for section in SWITCH_SECTIONS
        for name, value in getattr(settings, section).model_dump().items()
        if isinstance(value, bool)
    }


def run_record(settings: Settings) -> Path:
    """Where `rayloop up` writes what it started: process ids and URLs."""
    return settings.home / "run" / "up.json"


def live_side(settings: Settings) -> dict[str, Any]:
    """Whether what `rayloop up` started still runs, and its URLs."""
    try:
        record = json.loads(run_record(settings).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"running": False}
    pids = record.get("pids", {})
    dead = sorted(name for name, pid in pids.items() if not psutil.pid_exists(pid))
    return {"running": not dead, "ended": dead, "urls": record.get("urls", {})}


def _from_database(engine: Engine) -> dict[str, Any]:
    open_rollouts = sa.select(rollouts).where(rollouts.c.state.not_in(FINAL_ROLLOUT_STATES))
    by_state = sa.select(training_jobs.c.state, sa.func.count()).group_by(training_jobs.c.state)
    with engine.connect() as connection:
        newest = connection.execute(sa.select(events.c.seq, events.c.recorded_at_us).order_by(-events.c.seq).limit(1))
        last = newest.first()
        return {
            "events": {
                "last_seq": last.seq if last else 0,
                "last_at": to_iso(last.recorded_at_us) if last else None,
            },
            "routes": [_route(row) for row in connection.execute(sa.select(routes)).mappings()],
            "versions": [_replica(row) for row in connection.execute(_held()).mappings()],
            "rollouts": [_rollout(row) for row in connection.execute(open_rollouts).mappings()],
            "outlets": [dict(row) for row in connection.execute(_outlets()).mappings()],
            "jobs": {row[0]: row[1] for row in connection.execute(by_state)},
        }


def _held() -> sa.Select[Any]:
    """What replicas say of the versions they hold; a row without a version only says that a replica lives."""
    return sa.select(servable_replicas).where(servable_replicas.c.version != "")


def _outlets() -> sa.Select[Any]:
    """Outlets that have run, with the number of their dead letters."""
    dead = sa.select(sa.func.count()).where(dead_letters.c.outlet == outlets.c.name).scalar_subquery()
    return sa.select(outlets.c.name, outlets.c.delivered, outlets.c.failure, dead.label("dead")).order_by(
        outlets.c.name
    )


def _route(row: Any) -> dict[str, Any]:
    names = ("tenant", "agent", "modality", "stable", "arms", "max_share", "pinned", "revision")
    return {name: row[name] for name in names}


def _replica(row: Any) -> dict[str, Any]:
    age_s = (now_us() - row["heartbeat_us"]) / 1e6
    return {n: row[n] for n in ("engine", "version", "state", "reason")} | {"heartbeat_age_s": round(age_s, 1)}


def _rollout(row: Any) -> dict[str, Any]:
    return {n: row[n] for n in ("rollout_id", "agent", "state", "stage", "reason")}


def lines(picture: dict[str, Any]) -> list[str]:
    """The picture as text, one fact a line."""
    live, database = picture["live"], picture["database"]
    text = [f"{'on ' if on else 'off'}  {name}" for name, on in picture["switches"].items()]
    text.append("live side: " + ("running" if live["running"] else "not running; start it with `rayloop up`"))
    text += [f"  {name}: {url}" for name, url in live.get("urls", {}).items()]
    if not database["ok"]:
        return [*text, f"database: {database['reason']}"]
    text.append(f"events: {picture['events']['last_seq']}, newest {picture['events']['last_at'] or 'none'}")
    for r in picture["routes"]:
        split = "".join(f", {arm['version']} takes {arm['share']:.0%}" for arm in r["arms"])
        text.append(f"route {r['agent']} ({r['modality']}): {r['stable']}{split}, revision {r['revision']}")
    for v in picture["versions"]:
        text.append(f"engine {v['engine']}: {v['version']} {v['state']} {v['reason'] or ''}".rstrip())
    text += [
        f"rollout {r['rollout_id']} of {r['agent']}: {r['state']}, stage {r['stage']}" for r in picture["rollouts"]
    ]
    for o in picture["outlets"]:
        failure = f", stands still: {o['failure']}" if o["failure"] else ""
        text.append(f"{o['name']}: {o['delivered']} delivered, {o['dead']} dead letters{failure}")
    counts = ", ".join(f"{n} {state}" for state, n in picture["jobs"].items())
    return [*text, f"jobs: {counts or 'none'}"]
