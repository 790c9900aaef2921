"""Events to a broker, through FastStream: NATS JetStream or Kafka. Needs the extra `broker`.

A page of events is published in order, each acknowledged by the broker before the next. The connection is made
for the page: an idle one would have to be kept alive between pages, and one a second at most costs little.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import ConfigError
from cluster.settings.outlets import KafkaOutlet, NatsOutlet
from cluster.webhook import DeliveryError, environment_value
from data.events import RecordedEvent
from data.outlets.outlet import document, message_id

Publish = Callable[[RecordedEvent], Awaitable[None]]
Connect = Callable[[], AbstractAsyncContextManager[Publish]]


@dataclass(frozen=True, slots=True)
class BrokerSink:
    """Publishes pages of events."""

    connect: Connect
    at_once: int
    timeout_s: float
    too_large: tuple[type[Exception], ...]
    """What the broker's library raises for a message that it will never take."""

    def send(self, batch: Sequence[RecordedEvent]) -> None:
        arrived = 0

        async def publish_all() -> None:
            nonlocal arrived
            async with asyncio.timeout(self.timeout_s) as deadline, self.connect() as publish:
                for recorded in batch:
                    deadline.reschedule(asyncio.get_running_loop().time() + self.timeout_s)
                    await publish(recorded)
                    arrived += 1

        try:
            asyncio.run(publish_all())
        except self.too_large as error:
            raise _failed(error, "refused", arrived) from None
        except Exception as error:  # the libraries' errors have no common base; all others mean: later
            if arrived < len(batch):
                raise _failed(error, "unreachable", arrived) from None

    def close(self) -> None:
        """Nothing is held between pages."""


def _failed(error: Exception, how: Literal["refused", "unreachable"], arrived: int) -> DeliveryError:
    return DeliveryError(f"{type(error).__name__}: {error}"[:300], how, delivered=arrived)


def nats_sink(outlet: NatsOutlet, at_once: int) -> BrokerSink:
    """JetStream drops a message whose id it has seen within the stream's duplicate window (2 minutes by default).

    Raises:
        ConfigError: the extra is not installed, or the variable of the password is not set.
    """
    try:
        import nats.errors
        from faststream.nats import NatsBroker
    except ImportError:
        raise _missing("nats") from None
    login: dict[str, Any] = {} if outlet.user is None else {"user": outlet.user}
    if outlet.password_env is not None:
        login["password"] = environment_value(outlet.password_env)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Publish]:
        broker = NatsBroker(
            outlet.servers, logger=None, allow_reconnect=False, connect_timeout=max(1, round(outlet.timeout_s)), **login
        )
        async with broker:

            async def publish(recorded: RecordedEvent) -> None:
                await broker.publish(
                    document(recorded, scrubbed=outlet.scrub),
                    subject=_named(outlet.subject, recorded),
                    stream=outlet.stream,
                    headers={"Nats-Msg-Id": message_id(recorded.event)},
                    timeout=outlet.timeout_s,
                )

            yield publish

    return BrokerSink(connect, at_once, outlet.timeout_s, (nats.errors.MaxPayloadError,))


def kafka_sink(outlet: KafkaOutlet, at_once: int) -> BrokerSink:
    """The tenant is the key, so a tenant's events keep their order; the id is the header `rayloop-id`.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from aiokafka.errors import MessageSizeTooLargeError
        from faststream.kafka import KafkaBroker
    except ImportError:
        raise _missing("kafka") from None

    @asynccontextmanager
    async def connect() -> AsyncIterator[Publish]:
        broker = KafkaBroker(outlet.servers, logger=None, acks="all", request_timeout_ms=round(outlet.timeout_s * 1000))
        async with broker:

            async def publish(recorded: RecordedEvent) -> None:
                await broker.publish(
                    document(recorded, scrubbed=outlet.scrub),
                    topic=_named(outlet.topic, recorded),
                    key=recorded.event.tenant.encode(),
                    headers={"rayloop-id": message_id(recorded.event)},
                )

            yield publish

    return BrokerSink(connect, at_once, outlet.timeout_s, (MessageSizeTooLargeError,))


def _named(pattern: str, recorded: RecordedEvent) -> str:
    event = recorded.event
    for name, value in (("tenant", event.tenant), ("workspace", event.workspace), ("kind", event.kind)):
        pattern = pattern.replace("{" + name + "}", value)
    return pattern


def _missing(kind: str) -> ConfigError:
    return ConfigError("outlets.to", kind, "needs the extra `broker`", 'pip install -e ".[broker]"')
