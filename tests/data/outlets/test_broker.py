"""Events to a real NATS with JetStream, and to librdkafka's broker, which speaks Kafka's protocol."""

import asyncio
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from cluster.errors import ConfigError
from cluster.settings import load_settings
from data.events import Event
from data.log import EventLog
from data.outlets.outlet import Outlet, read_dead_letters
from data.outlets.sinks import plans
from tests.conftest import skip_or_fail
from tests.services import refused

NATS = os.environ.get("RAYLOOP_TEST_NATS", "nats://127.0.0.1:4222")


@pytest.fixture
def stream() -> Iterator[str]:
    """Name of a stream of its own, removed afterwards; it takes the subjects `<name>.>`."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    try:
        asyncio.run(_with_nats(lambda js: js.add_stream(name=name, subjects=[f"{name}.>"], max_bytes=2**20)))
    except Exception as error:
        skip_or_fail(f"no NATS with JetStream at {NATS} ({error!r}); start `nats-server -js` or set RAYLOOP_TEST_NATS")
    yield name
    asyncio.run(_with_nats(lambda js: js.delete_stream(name)))


async def _with_nats(act: Any) -> Any:
    import nats

    client = await nats.connect(NATS, allow_reconnect=False, connect_timeout=2)
    try:
        return await act(client.jetstream())
    finally:
        await client.close()


def stored(stream: str) -> list[Any]:
    """Every message of the stream, in order."""

    async def read(js: Any) -> list[Any]:
        last = (await js.stream_info(stream)).state.last_seq
        return [await js.get_msg(stream, seq) for seq in range(1, last + 1)]

    found: list[Any] = asyncio.run(_with_nats(read))
    return found


def nats_outlet(engine: Engine, home: Path, stream: str, **changes: Any) -> Outlet:
    fields = {
        "type": "nats", "servers": [NATS], "stream": stream, "subject": f"{stream}.{{tenant}}.{{kind}}",
        "kinds": ["outcome"], "start": "beginning", "timeout_s": 5,
    }  # fmt: skip
    settings = load_settings(home=home, outlets={"to": {"bus": fields | changes}})[0]
    return Outlet(plans(settings)[0], engine, settings.outlets)


def append(engine: Engine, *ids: str, text: str = "x") -> None:
    body = {"name": "solved", "value": 1.0, "metadata": {"note": text}}
    EventLog(engine).append([Event("outcome", "acme", "main", body, event_id=i) for i in ids])


@pytest.mark.nats
def test_events_are_stored_in_order_with_subject_and_id(database: Engine, tmp_path: Path, stream: str) -> None:
    append(database, "a", "b", "c", text="mail eve@example.com")
    outlet = nats_outlet(database, tmp_path, stream)
    outlet.step()
    messages = stored(stream)
    assert [m.headers["Nats-Msg-Id"] for m in messages] == ["acme/a", "acme/b", "acme/c"]
    assert {m.subject for m in messages} == {f"{stream}.acme.outcome"}
    document = json.loads(messages[0].data)
    assert (document["id"], document["body"]["metadata"]) == ("acme/a", {"note": "mail <EMAIL_1>"})
    assert outlet.progress().delivered == 3


@pytest.mark.nats
def test_event_sent_again_is_stored_once(sqlite_database: Engine, tmp_path: Path, stream: str) -> None:
    append(sqlite_database, "a", "b")
    outlet = nats_outlet(sqlite_database, tmp_path, stream)
    page = EventLog(sqlite_database).read()
    outlet.sink.send(page)  # a process that died before it moved the cursor
    outlet.step()
    assert [m.headers["Nats-Msg-Id"] for m in stored(stream)] == ["acme/a", "acme/b"]
    assert outlet.progress().delivered == 2


@pytest.mark.nats
def test_message_too_large_for_the_broker_is_put_aside(sqlite_database: Engine, tmp_path: Path, stream: str) -> None:
    append(sqlite_database, "a")
    append(sqlite_database, "huge", text="x" * 2_000_000)
    append(sqlite_database, "b")
    outlet = nats_outlet(sqlite_database, tmp_path, stream)
    while outlet.step() == 0.0:
        pass
    assert [m.headers["Nats-Msg-Id"] for m in stored(stream)] == ["acme/a", "acme/b"]
    assert [letter["event_id"] for letter in read_dead_letters(sqlite_database)] == ["huge"]


@pytest.mark.nats
def test_missing_stream_is_waited_for(sqlite_database: Engine, tmp_path: Path, stream: str) -> None:
    append(sqlite_database, "a")
    outlet = nats_outlet(sqlite_database, tmp_path, "none-such", subject="none-such.{kind}")
    outlet.step()
    progress = outlet.progress()
    assert (progress.attempts, progress.delivered) == (1, 0)
    assert progress.failure


@pytest.fixture
def kafka() -> Iterator[str]:
    """Bootstrap address of librdkafka's own broker, which speaks Kafka's protocol in this process."""
    from confluent_kafka import Producer

    host = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "none", "log_level": 0})
    (broker,) = host.list_topics(timeout=10).brokers.values()
    yield f"{broker.host}:{broker.port}"
    del host


def consumed(address: str, topic: str, number: int) -> list[Any]:
    """The first messages of a topic."""
    from aiokafka import AIOKafkaConsumer

    async def read() -> list[Any]:
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=address, auto_offset_reset="earliest", group_id=None)
        await consumer.start()
        try:
            return [await asyncio.wait_for(consumer.getone(), 20) for _ in range(number)]
        finally:
            await consumer.stop()

    return asyncio.run(read())


def test_kafka_gets_events_in_order_with_key_and_id(sqlite_database: Engine, tmp_path: Path, kafka: str) -> None:
    fields = {"type": "kafka", "servers": [kafka], "topic": "events.{kind}", "kinds": ["outcome"], "start": "beginning"}
    settings = load_settings(home=tmp_path, outlets={"to": {"bus": fields}})[0]
    outlet = Outlet(plans(settings)[0], sqlite_database, settings.outlets)
    append(sqlite_database, "a", "b", "c", text="mail eve@example.com")
    outlet.step()
    assert outlet.progress().delivered == 3
    messages = consumed(kafka, "events.outcome", 3)
    assert [dict(m.headers)["rayloop-id"] for m in messages] == [b"acme/a", b"acme/b", b"acme/c"]
    assert {m.key for m in messages} == {b"acme"}
    assert json.loads(messages[0].value)["body"]["metadata"] == {"note": "mail <EMAIL_1>"}


@pytest.mark.parametrize("kind", ["nats", "kafka"])
def test_absent_broker_is_waited_for(kind: str, sqlite_database: Engine, tmp_path: Path) -> None:
    address = refused().removeprefix("http://")
    fields = {"type": kind, "servers": [f"nats://{address}" if kind == "nats" else address], "timeout_s": 1}
    to = {"bus": fields | {"kinds": ["outcome"], "start": "beginning"}}
    settings = load_settings(home=tmp_path, outlets={"to": to})[0]
    outlet = Outlet(plans(settings)[0], sqlite_database, settings.outlets)
    append(sqlite_database, "a")
    outlet.step()
    progress = outlet.progress()
    assert (progress.attempts, progress.delivered, progress.seq) == (1, 0, 0)
    assert progress.failure


def test_absent_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faststream.kafka", None)
    settings = load_settings(home=tmp_path, outlets={"to": {"bus": {"type": "kafka"}}})[0]
    with pytest.raises(ConfigError, match="needs the extra `broker`"):
        plans(settings)[0].open()
