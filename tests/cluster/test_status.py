import json
import os

from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.settings import Settings, load_settings
from cluster.status import collect, lines, run_record
from cluster.tables import dead_letters, outlets, routes, servable_replicas


def test_every_switch_is_off_by_default_but_for_the_two_of_automation(settings: Settings) -> None:
    on = {name for name, value in collect(settings)["switches"].items() if value}
    assert on == {
        "automation.auto_finetune",
        "automation.auto_experiment",
        "automation.rollback_on_regression",
    }


def test_route_is_shown_with_its_split(sqlite_database: Engine, settings: Settings) -> None:
    row = {
        "tenant": "t",
        "agent": "triage",
        "modality": "text",
        "stable": "triage/1",
        "arms": [{"version": "triage/2", "start": 0.0, "share": 0.25, "experiment_id": None}],
    }
    row |= {
        "max_share": 1.0,
        "salt": "s",
        "pinned": False,
        "revision": 4,
        "updated_by": "person:a",
    }
    with sqlite_database.begin() as connection:
        connection.execute(routes.insert().values(**row, updated_at_us=now_us()))
    shown = lines(collect(settings))
    assert "route triage (text): triage/1, triage/2 takes 25%, revision 4" in shown


def test_outlet_that_stands_still_says_why(sqlite_database: Engine, settings: Settings) -> None:
    row = {"name": "outlet:bus", "seq": 9, "delivered": 7, "attempts": 2, "retry_at_us": 1, "updated_at_us": 1}
    letter = {
        "seq": 3,
        "event_id": "e",
        "kind": "outcome",
        "tenant": "t",
        "reason": "r",
        "attempts": 1,
        "died_at_us": 1,
    }
    with sqlite_database.begin() as connection:
        connection.execute(outlets.insert().values(**row, failure="status 500"))
        connection.execute(dead_letters.insert().values(outlet="outlet:bus", **letter))
    shown = lines(collect(settings))
    assert "outlet:bus: 7 delivered, 1 dead letters, stands still: status 500" in shown


def test_live_side_is_not_running_once_one_of_its_processes_ended(settings: Settings) -> None:
    record = run_record(settings)
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"pids": {"ray": os.getpid(), "mlflow": 2**22 + 1}, "urls": {}}))
    assert collect(settings)["live"] == {"running": False, "ended": ["mlflow"], "urls": {}}


def test_unreachable_database_is_reported_in_one_line(settings: Settings) -> None:
    url = "postgresql://postgres@127.0.0.1:1/none"
    picture = collect(load_settings(home=settings.home, database={"url": url})[0])
    assert picture["database"]["ok"] is False
    assert "does not answer" in lines(picture)[-1]


def test_versions_are_shown_and_the_row_of_a_living_replica_is_not(sqlite_database: Engine, settings: Settings) -> None:
    row = {"engine": "local", "replica_id": "r", "state": "ready", "heartbeat_us": now_us()}
    with sqlite_database.begin() as connection:
        connection.execute(servable_replicas.insert().values([row | {"version": v} for v in ("", "triage/2")]))
    assert [line for line in lines(collect(settings)) if line.startswith("engine")] == ["engine local: triage/2 ready"]
