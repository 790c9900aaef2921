import contextlib
import threading
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import ConfigError, ConflictError, InputError, NotFoundError
from data.log import EventLog
from serve.deployment_config import apply_config, parse_config
from serve.routes import Route, RouteKey, read_route, read_routes, write_route

KEY = RouteKey("acme", "triage")


def make(database: Engine, **change: Any) -> Route:
    change = {"stable": "triage/1"} | change
    return write_route(database, KEY, change, expected_revision=0, writer="person:ann")


def test_write_needs_the_revision_it_read_and_leaves_an_event(database: Engine) -> None:
    first = make(database)
    second = write_route(
        database, KEY, {"candidate": "triage/2", "share": 0.1}, expected_revision=1, writer="controller"
    )
    with pytest.raises(ConflictError, match="has revision 2, not 1"):
        write_route(database, KEY, {"share": 0.5}, expected_revision=1, writer="controller")
    assert (first.revision, second.revision, read_route(database, KEY).share) == (1, 2, 0.1)
    bodies = [r.event.body for r in EventLog(database).read(kinds=["route.changed"])]
    assert [(b["writer"], b["revision"], [arm["share"] for arm in b["after"]["arms"]]) for b in bodies] == [
        ("person:ann", 1, []),
        ("controller", 2, [0.1]),
    ]
    assert bodies[1]["before"]["revision"] == 1


def test_of_many_writers_with_one_revision_one_wins(database: Engine) -> None:
    make(database, candidate="triage/2")
    won: list[float] = []

    def work(share: float) -> None:
        with contextlib.suppress(ConflictError):
            won.append(write_route(database, KEY, {"share": share}, expected_revision=1, writer="controller").share)

    threads = [threading.Thread(target=work, args=(n / 10,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_route(database, KEY).share] == won
    assert len(EventLog(database).read(kinds=["route.changed"])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, "share=1.5 must be between 0 and 1"),
        ({"share": float("nan")}, "share=nan must be between 0 and 1"),
        ({"share": True}, "share=True must be"),
        ({"share": 0.2}, "share=0.2 needs a candidate"),
        ({"candidate": "triage/1"}, "candidate='triage/1' must differ from stable"),
        ({"colour": "red"}, "colour='red' is not a field of a route"),
        ({"candidate": "nonsense"}, "candidate='nonsense' is not the name of a version"),
        ({"shadow": "triage/0"}, "shadow='triage/0' is not the name of a version"),
        ({"stable": "triage/latest"}, "stable='triage/latest' is not the name of a version"),
    ],
)
def test_wrong_values_are_refused_with_the_rule(sqlite_database: Engine, change: dict[str, Any], message: str) -> None:
    make(sqlite_database)
    with pytest.raises(InputError) as caught:
        write_route(sqlite_database, KEY, change, expected_revision=1, writer="controller")
    assert message in str(caught.value)
    assert read_route(sqlite_database, KEY).revision == 1


def test_new_candidate_gets_a_new_salt_and_a_larger_share_keeps_it(sqlite_database: Engine) -> None:
    first = make(sqlite_database, candidate="triage/2", share=0.1)
    grown = write_route(sqlite_database, KEY, {"share": 0.5}, expected_revision=1, writer="controller")
    other = write_route(sqlite_database, KEY, {"candidate": "triage/3"}, expected_revision=2, writer="controller")
    gone = write_route(sqlite_database, KEY, {"candidate": None}, expected_revision=3, writer="controller")
    assert first.salt == grown.salt != other.salt
    assert (gone.share, gone.live_share) == (0.0, 0.0)


def test_unknown_route_names_the_known(sqlite_database: Engine) -> None:
    make(sqlite_database)
    with pytest.raises(NotFoundError, match=r"known: triage \(text\)"):
        read_route(sqlite_database, RouteKey("acme", "billing"))


def declare(**route: Any) -> Any:
    generation = route.pop("generation", None)
    return parse_config({"generation": generation, "routes": [{"agent": "triage"} | route]})


def test_unchanged_config_never_undoes_a_later_change(database: Engine) -> None:
    config = declare(stable="triage/1", candidate="triage/2", share=0.1)
    assert [a.status for a in apply_config(database, config, tenant="acme")] == ["applied"]
    write_route(database, KEY, {"share": 0.5}, expected_revision=1, writer="controller")
    assert [a.status for a in apply_config(database, config, tenant="acme")] == ["unchanged"]
    assert read_route(database, KEY).share == 0.5
    edited = declare(stable="triage/1", candidate="triage/2", share=0.25)
    assert [a.status for a in apply_config(database, edited, tenant="acme")] == ["applied"]
    assert (read_route(database, KEY).share, read_route(database, KEY).updated_by) == (0.25, "config")


def test_fields_a_config_leaves_out_keep_their_value(sqlite_database: Engine) -> None:
    make(sqlite_database, candidate="triage/2", share=0.5)
    apply_config(sqlite_database, declare(max_share=0.3), tenant="acme")
    route = read_route(sqlite_database, KEY)
    assert (route.stable, route.candidate, route.share, route.live_share) == (
        "triage/1",
        "triage/2",
        0.5,
        0.3,
    )


def test_older_generation_is_refused_and_nothing_is_written(database: Engine) -> None:
    apply_config(database, declare(stable="triage/1", candidate="triage/2", generation=7), tenant="acme")
    apply_config(database, declare(stable="triage/1", candidate="triage/2", generation=9), tenant="acme")
    with pytest.raises(ConfigError, match="generation=8 must be at least 9"):
        apply_config(database, declare(stable="triage/1", share=0.9, generation=8), tenant="acme")
    assert read_route(database, KEY).revision == 1


def test_nobody_but_the_config_passes_its_ceiling(sqlite_database: Engine) -> None:
    apply_config(
        sqlite_database,
        declare(stable="triage/1", candidate="triage/2", share=0.1, max_share=0.2),
        tenant="acme",
    )
    for change in ({"share": 0.3}, {"max_share": 1.0}, {"stable": "triage/2", "candidate": None}):
        with pytest.raises(ConflictError, match="deployment config"):
            write_route(sqlite_database, KEY, change, expected_revision=1, writer="controller")
    assert write_route(sqlite_database, KEY, {"share": 0.2}, expected_revision=1, writer="controller").share == 0.2


def test_one_bad_route_leaves_the_others_unwritten(database: Engine) -> None:
    config = parse_config({"routes": [{"agent": "triage", "stable": "triage/1"}, {"agent": "billing", "share": 0.5}]})
    with pytest.raises(ConfigError, match="billing"):
        apply_config(database, config, tenant="acme")
    assert read_routes(database) == []


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"routes": [{"agent": "triage", "share": 2}]}, "user_config.routes.0.share=2"),
        ({"routes": [{"agent": "triage", "shares": 0.2}]}, "user_config.routes.0.shares=0.2"),
        (
            {"routes": [{"agent": "a", "share": 0.4, "max_share": 0.2}]},
            "share 0.4 must not exceed max_share 0.2",
        ),
        ({"routes": [{"agent": "a"}, {"agent": "a"}]}, "declared twice"),
        ({"routes": [{"agent": "a", "stable": "latest"}]}, "stable='latest'"),
        ({"routes": {"a": 1}}, "user_config.routes"),
        (["routes"], "user_config"),
    ],
)
def test_broken_config_gives_its_place_and_rule(document: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert message in str(caught.value)
