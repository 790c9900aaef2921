"""Outlets on both databases: order, retries, dead letters, restarts, several processes, commands."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.engine import Engine

from cluster import metrics
from cluster.cli import main
from cluster.clock import SECOND_US, now_us
from cluster.database import connect, write
from cluster.errors import ConfigError, ConflictError, NotFoundError
from cluster.settings import Settings, load_settings
from cluster.tables import event_bodies, events
from cluster.webhook import DeliveryError, signature
from data.events import Event, RecordedEvent
from data.job_endings import append_job_ended
from data.log import EventLog
from data.outlets.loop import OutletLoop
from data.outlets.outlet import Outlet, Plan, drop, read_dead_letters, read_progress, resend, waiting
from data.outlets.sinks import plans
from tests import processes
from tests.services import Scripted, refused, scripted

SETTINGS = load_settings()[0].outlets


class Receiver:
    """A sink that keeps what arrives and fails as it is told."""

    def __init__(
        self, at_once: int = 1, fail: Callable[[RecordedEvent], DeliveryError | None] = lambda _: None
    ) -> None:
        self.at_once, self.fail = at_once, fail
        self.seen: list[str] = []

    def send(self, batch: Sequence[RecordedEvent]) -> None:
        for number, recorded in enumerate(batch):
            error = self.fail(recorded)
            if error is not None:
                error.delivered = number
                raise error
            self.seen.append(recorded.event.event_id)

    def close(self) -> None: ...


class Clock:
    def __init__(self) -> None:
        self.now = now_us()

    def __call__(self) -> int:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += round(seconds * SECOND_US)


def append(engine: Engine, *ids: str, kind: str = "outcome", **body: Any) -> None:
    content = {"name": "solved", "value": 1.0} | body
    batch = [Event(kind, "default", "default", content, event_id=event_id, interaction_id="i1") for event_id in ids]
    EventLog(engine).append(batch)


def outlet_of(engine: Engine, receiver: Receiver, clock: Callable[[], int] = now_us, **changes: Any) -> Outlet:
    plan = Plan(
        **({"name": "outlet:x", "kinds": ("outcome",), "open": lambda: receiver, "start": "beginning"} | changes)
    )
    return Outlet(plan, engine, SETTINGS, clock)


def run(outlet: Outlet) -> None:
    while not outlet.progress().attempts and outlet.step() == 0.0:
        pass


@pytest.mark.parametrize("at_once", [1, 3, 500])
def test_everything_arrives_once_in_order_also_after_a_restart(database: Engine, at_once: int) -> None:
    receiver = Receiver(at_once)
    append(database, *[f"a{i}" for i in range(10)])
    append(database, "other", kind="dataset.ready")
    run(outlet_of(database, receiver))
    append(database, *[f"b{i}" for i in range(5)])
    run(outlet_of(database, receiver))
    assert receiver.seen == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(5)]
    progress = read_progress(database)[0]
    assert (progress.delivered, progress.failure) == (15, None)


def test_new_outlet_begins_behind_the_newest_event(sqlite_database: Engine) -> None:
    receiver = Receiver()
    append(sqlite_database, "old")
    outlet = outlet_of(sqlite_database, receiver, start="now")
    run(outlet)
    append(sqlite_database, "new")
    run(outlet)
    assert receiver.seen == ["new"]


def test_failing_receiver_is_tried_again_after_growing_pauses(database: Engine) -> None:
    clock, broken = Clock(), [True]
    receiver = Receiver(fail=lambda _: DeliveryError("status 500", "failed") if broken[0] else None)
    append(database, "a", "b")
    pauses = []
    for _ in range(4):
        outlet = outlet_of(database, receiver, clock)  # a restart forgets nothing of it
        outlet.step()
        pauses.append(outlet.step())
        assert receiver.seen == []
        clock.pass_s(pauses[-1])
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    broken[0] = False
    outlet_of(database, receiver, clock).step()
    assert receiver.seen == ["a", "b"]
    assert read_progress(database)[0].attempts == 0


def test_deliveries_failures_and_what_waits_are_measured(database: Engine) -> None:
    name = f"outlet:{database.dialect.name}"

    def measured(metric: str, **labels: str) -> float:
        return metrics.REGISTRY.get_sample_value(metric, {"outlet": name} | labels) or 0.0

    clock = Clock()
    words = {"b": DeliveryError("status 500", "failed"), "c": DeliveryError("status 410", "refused")}
    receiver = Receiver(fail=lambda recorded: words.pop(recorded.event.event_id, None))
    append(database, "a", "b", "c", "d")
    outlet = outlet_of(database, receiver, clock, name=name)
    outlet.step()
    outlet.measure()
    assert (measured("rayloop_outlet_waiting"), measured("rayloop_outlet_dead_letters")) == (3.0, 0.0)
    clock.pass_s(1)
    outlet.step()
    outlet.step()
    outlet.measure()
    assert receiver.seen == ["a", "b", "d"]
    assert (measured("rayloop_outlet_waiting"), measured("rayloop_outlet_dead_letters")) == (0.0, 1.0)
    assert measured("rayloop_outlet_delivered_total") == 3.0
    assert [measured("rayloop_outlet_failures_total", outcome=o) for o in ("retry", "dead")] == [1.0, 1.0]


def test_receiver_says_how_long_to_wait(sqlite_database: Engine) -> None:
    clock = Clock()
    receiver = Receiver(fail=lambda _: DeliveryError("busy", "failed", retry_after_s=90))
    append(sqlite_database, "a")
    outlet = outlet_of(sqlite_database, receiver, clock)
    outlet.step()
    assert outlet.step() == 90.0


def test_part_of_a_page_that_arrived_is_not_sent_again(database: Engine) -> None:
    clock, broken = Clock(), [True]

    def fail(recorded: RecordedEvent) -> DeliveryError | None:
        return DeliveryError("gone", "unreachable") if broken[0] and recorded.event.event_id == "c" else None

    receiver = Receiver(10, fail)
    append(database, "a", "b", "c", "d")
    outlet = outlet_of(database, receiver, clock)
    outlet.step()
    assert (receiver.seen, outlet.progress().delivered) == (["a", "b"], 2)
    broken[0] = False
    clock.pass_s(1)
    outlet.step()
    assert receiver.seen == ["a", "b", "c", "d"]


def test_refused_event_is_put_aside_and_the_next_delivered(database: Engine) -> None:
    receiver = Receiver(fail=lambda r: DeliveryError("no", "refused") if r.event.event_id == "bad" else None)
    append(database, "a", "bad", "b")
    run(outlet_of(database, receiver))
    assert receiver.seen == ["a", "b"]
    (letter,) = read_dead_letters(database)
    assert (letter["event_id"], letter["reason"], letter["attempts"], letter["kind"]) == ("bad", "no", 1, "outcome")


def test_poisonous_event_is_put_aside_after_the_last_attempt(sqlite_database: Engine) -> None:
    clock = Clock()
    receiver = Receiver(fail=lambda r: DeliveryError("500", "failed") if r.event.event_id == "bad" else None)
    append(sqlite_database, "bad", "b")
    outlet = outlet_of(sqlite_database, receiver, clock)
    for _ in range(SETTINGS.max_attempts):
        assert receiver.seen == []
        outlet.step()
        clock.pass_s(SETTINGS.retry_max_s)
    run(outlet)
    assert receiver.seen == ["b"]
    assert read_dead_letters(sqlite_database)[0]["attempts"] == SETTINGS.max_attempts


def test_absent_receiver_is_waited_for_until_an_event_is_too_old(sqlite_database: Engine) -> None:
    clock = Clock()
    receiver = Receiver(fail=lambda _: DeliveryError("nobody", "unreachable"))
    append(sqlite_database, "a")
    outlet = outlet_of(sqlite_database, receiver, clock)
    for _ in range(3 * SETTINGS.max_attempts):
        outlet.step()
        clock.pass_s(SETTINGS.retry_max_s)
    assert read_dead_letters(sqlite_database) == []
    clock.pass_s(SETTINGS.give_up_after_s)
    outlet.step()
    assert [letter["event_id"] for letter in read_dead_letters(sqlite_database)] == ["a"]


def test_dead_letter_can_be_sent_later_or_forgotten(database: Engine) -> None:
    broken = [True]
    receiver = Receiver(fail=lambda _: DeliveryError("no", "refused") if broken[0] else None)
    append(database, "a", "b")
    run(outlet_of(database, receiver))
    with pytest.raises(DeliveryError):
        resend(database, "outlet:x", receiver, 1)
    assert len(read_dead_letters(database)) == 2
    broken[0] = False
    resend(database, "outlet:x", receiver, 1)
    assert receiver.seen == ["a"]
    drop(database, "outlet:x", 2)
    assert read_dead_letters(database) == []
    with pytest.raises(NotFoundError, match="no dead letter 2"):
        resend(database, "outlet:x", receiver, 2)


def test_erased_event_does_not_leave(database: Engine) -> None:
    receiver = Receiver()
    append(database, "a", "b")
    with write(database).begin() as connection:
        connection.execute(event_bodies.delete().where(event_bodies.c.seq == 1))
        connection.execute(events.update().where(events.c.seq == 1).values(erased=True))
    run(outlet_of(database, receiver))
    assert receiver.seen == ["b"]


def test_second_process_notices_that_it_is_not_alone(database: Engine) -> None:
    first, second = Receiver(), Receiver()
    append(database, "a", "b")
    slow = outlet_of(database, first)
    before = slow.progress()
    outlet_of(database, second).step()
    with pytest.raises(ConflictError, match="moved by another process"):
        slow._move(before, 1, 1)
    assert second.seen == ["a", "b"]
    assert read_progress(database)[0].seq == 2


def test_process_that_lost_its_lease_stops_in_the_middle_of_a_page(sqlite_database: Engine) -> None:
    receiver = Receiver()
    append(sqlite_database, "a", "b", "c")
    answers = iter([True, False])
    outlet_of(sqlite_database, receiver).step(lambda: next(answers))
    assert receiver.seen == ["a"]


# through the settings, over real HTTP


def configured(home: Path, **document: Any) -> Settings:
    quick = {"poll_s": 0.05, "retry_first_s": 0.05, "lease_s": 5.0}
    document["outlets"] = quick | document.get("outlets", {})
    return load_settings(home=home, **document)[0]


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60  # a process may have to start
    while not met():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_event_leaves_signed_and_scrubbed_and_a_notice_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "s" * 24)
    hook, chat = Scripted((500, b"", {}), (200, b"", {})), Scripted((200, b"", {}))
    with scripted(hook) as url, scripted(chat) as chat_url:
        monkeypatch.setenv("CHAT", chat_url)
        to = {"hook": {"type": "webhook", "url": url, "secret_env": "HOOK_SECRET", "kinds": ["outcome", "job.ended"]}}
        channels = {"chat": {"type": "slack", "url_env": "CHAT", "severities": ["ticket"]}}
        settings = configured(tmp_path, outlets={"to": to}, notifications={"channels": channels})
        engine, loop = connect(settings), OutletLoop(settings)
        loop.start()
        wait_for(lambda: len(read_progress(engine)) == 2)
        append(engine, "a", metadata={"mail": "eve@example.com"})
        failed = {"job_id": "j1", "job": "sft", "state": "failed", "reason": "no data", "cause": "DatasetError"}
        EventLog(engine).append([Event("job.ended", "default", "default", failed, event_id="e2", agent="triage")])
        wait_for(lambda: len(hook.requests) >= 3 and len(chat.requests) >= 1)
        loop.stop()
        assert loop.alive == []
    first, again = hook.requests[0], hook.requests[1]
    assert first[1] == again[1]
    assert first[2]["webhook-id"] == again[2]["webhook-id"] == "default/a"
    for _, body, headers in hook.requests:
        timestamp_s = int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == signature(b"s" * 24, headers["webhook-id"], timestamp_s, body)
    document = json.loads(first[1])
    assert (document["type"], document["body"]["metadata"]) == ("outcome", {"mail": "<EMAIL_1>"})
    assert "triage: sft j1 failed" in json.loads(chat.requests[-1][1])["text"]
    engine.dispose()


def test_one_dead_receiver_holds_up_nobody_else(tmp_path: Path) -> None:
    good = Scripted((200, b"", {}))
    with scripted(good) as url:
        to = {name: {"type": "webhook", "url": place, "kinds": ["outcome"]} for name, place in
              {"dead": refused(), "good": url}.items()}  # fmt: skip
        settings = configured(tmp_path, outlets={"to": to})
        engine, loop = connect(settings), OutletLoop(settings)
        loop.start()
        wait_for(lambda: len(read_progress(engine)) == 2)
        append(engine, *[f"e{i}" for i in range(20)])
        wait_for(lambda: len(good.requests) == 20)
        states = {p.name: p for p in read_progress(engine)}
        loop.stop()
    assert states["outlet:dead"].delivered == 0
    engine.dispose()


def deliver_until_killed(home: Path, url: str) -> None:
    to = {"hook": {"type": "webhook", "url": url, "kinds": ["outcome"], "start": "beginning"}}
    OutletLoop(settings := configured(home, outlets={"to": to, "lease_s": 1.5})).start()
    threading.Event().wait(settings.outlets.give_up_after_s)


def test_killed_process_loses_nothing_and_repeats_at_most_the_delivery_under_way(tmp_path: Path) -> None:
    """At least once, by the same id: what a receiver that remembers ids makes of it is exactly once."""
    service, total, kills = Scripted((200, b"", {})), 60, 3
    with scripted(service) as url:
        settings = configured(tmp_path)
        engine = connect(settings)
        append(engine, *[f"e{i}" for i in range(total)])
        for number in range(kills + 1):
            had = len(service.requests)
            process = processes.start(deliver_until_killed, tmp_path, url)
            goal = total if number == kills else min(total, had + 10)
            wait_for(lambda goal=goal: len({r[2]["webhook-id"] for r in service.requests}) >= goal)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        engine.dispose()
    ids = [headers["webhook-id"] for _, _, headers in service.requests]
    assert set(ids) == {f"default/e{i}" for i in range(total)}
    assert len(ids) - len(set(ids)) <= kills
    assert list(dict.fromkeys(ids)) == [f"default/e{i}" for i in range(total)]


# settings and commands


def test_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    settings = configured(tmp_path, outlets={"to": {"x": {"type": "webhook", "url": "http://h", "kinds": ["nope"]}}})
    with pytest.raises(ConfigError, match=r"outlets.to.x.kinds='nope' must be one of interaction"):
        plans(settings)


def write_config(folder: Path, document: dict[str, Any]) -> str:
    file = folder / "rayloop.yaml"
    file.write_text(yaml.safe_dump({"home": str(folder / "home")} | document))
    return str(file)


def test_commands_show_run_retry_and_drop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Scripted((422, b"no", {}), (422, b"no", {}), (200, b"", {}))
    with scripted(service) as url:
        to = {"hook": {"type": "webhook", "url": url, "kinds": ["outcome"], "start": "beginning"}}
        config = write_config(tmp_path, {"outlets": {"to": to}})

        def rayloop(*arguments: str) -> Any:
            with pytest.raises(SystemExit) as ended:
                main(["outlets", *arguments, "--json", "--config", config])
            assert ended.value.code == 0
            return json.loads(capsys.readouterr().out)

        assert rayloop("list")["outlets"][0]["started"] is False
        engine = connect(load_settings(config)[0])
        append(engine, "a", "b", "c")
        once = processes.rayloop("outlets", "run", "--once", "--json", "--config", config)
        assert (once.returncode, "could not deliver everything" in once.stderr) == (1, True)
        assert json.loads(once.stdout)["outlets"] == {
            "outlet:hook": {"delivered": 1, "dead": 2, "failure": "status 422: no"}
        }
        row = rayloop("list")["outlets"][0]
        assert (row["delivered"], row["waiting"], row["dead"]) == (1, 0, 2)
        assert [letter["event_id"] for letter in rayloop("dead")["dead_letters"]] == ["a", "b"]
        assert rayloop("retry", "outlet:hook", "--seq", "1") == {"sent": 1, "failed": {}}
        assert rayloop("drop", "outlet:hook", "--seq", "2") == {"dropped": 2}
        assert rayloop("dead")["dead_letters"] == []
        engine.dispose()


def test_waiting_counts_what_is_behind_the_cursor(database: Engine) -> None:
    append(database, "a", "b", "c")
    append(database, "d", kind="dataset.ready")
    plan = Plan("outlet:x", ("outcome",), open=Receiver)
    assert waiting(database, plan, 1) == 2


def test_job_that_ends_is_told_once_a_try(database: Engine) -> None:
    from cluster.errors import HealthGateError
    from cluster.jobs import Jobs

    jobs = Jobs(database, "acme", "main")
    jobs.create("dpo", job_id="j1", agent="triage", dataset_id="d1")
    jobs.start("j1")
    for _ in range(2):
        append_job_ended(database, jobs.get("j1") if jobs.get("j1").state == "failed" else jobs.fail("j1", "nan"),
                         HealthGateError("nan"))  # fmt: skip
    (told,) = EventLog(database).read(kinds=["job.ended"])
    assert told.event.body == {
        "job_id": "j1", "job": "dpo", "state": "failed", "dataset_id": "d1", "reason": "nan",
        "cause": "HealthGateError",
    }  # fmt: skip


PAGE = Path(__file__).parents[3] / "docs" / "notifications.md"


def blocks(language: str) -> list[str]:
    return [part.partition("```")[0] for part in PAGE.read_text(encoding="utf-8").split(f"```{language}\n")[1:]]


def test_documented_settings_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "rayloop.yaml"
    file.write_text("\n".join(blocks("yaml")))
    settings, _ = load_settings(file)
    assert [plan.name for plan in plans(settings)] == [
        *("outlet:warehouse", "outlet:bus", "outlet:lake"),
        *("notify:team", "notify:on-call", "notify:leads", "notify:anything"),
    ]


def test_documented_check_knows_our_signature_from_a_forged_one() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    headers = {"webhook-id": "acme/e1", "webhook-timestamp": "1614265330"}
    headers["webhook-signature"] = signature(b"s" * 16, "acme/e1", 1614265330, b"{}")
    assert names["is_genuine"]("s" * 16, headers, b"{}")
    assert not names["is_genuine"]("s" * 16, headers, b"{ }")
