"""Where events go: a signed webhook, people, NATS or Kafka; and the plans that the settings make of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from cluster.errors import ConfigError
from cluster.notify import Messenger, messenger
from cluster.settings import Settings
from cluster.settings.outlets import AnyChannel, AnyOutlet, KafkaOutlet, NatsOutlet, WebhookOutlet
from cluster.webhook import Webhook, secret_bytes
from data.events import BODIES, RecordedEvent
from data.outlets.notices import WORDS, notice
from data.outlets.outlet import Plan, Sink, document, message_id


@dataclass(frozen=True, slots=True)
class WebhookSink:
    """One signed POST an event."""

    webhook: Webhook
    scrub: bool
    at_once: int = 1

    def send(self, batch: Sequence[RecordedEvent]) -> None:
        (recorded,) = batch
        self.webhook.send(message_id(recorded.event), orjson.dumps(document(recorded, scrubbed=self.scrub)))

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class NoticeSink:
    """People, in words."""

    messenger: Messenger
    at_once: int = 1

    def send(self, batch: Sequence[RecordedEvent]) -> None:
        (recorded,) = batch
        said = notice(recorded)
        if said is not None:
            self.messenger.send(said)

    def close(self) -> None:
        """Nothing is held."""


def plans(settings: Settings) -> list[Plan]:
    """Every outlet and channel of the settings.

    Raises:
        ConfigError: an outlet names a kind of event that does not exist.
    """
    found = [_outlet(name, outlet, settings) for name, outlet in settings.outlets.to.items()]
    return found + [_channel(name, channel) for name, channel in settings.notifications.channels.items()]


def _outlet(name: str, outlet: AnyOutlet, settings: Settings) -> Plan:
    for kind in outlet.kinds:
        if kind not in BODIES:
            known = ", ".join(BODIES)
            raise ConfigError(f"outlets.to.{name}.kinds", kind, f"must be one of {known}", "name known kinds")
    return Plan(
        name=f"outlet:{name}",
        kinds=tuple(outlet.kinds),
        open=functools.partial(open_sink, outlet, settings.outlets.page_events),
        tenant=outlet.tenant,
        start=outlet.start,
    )


def open_sink(outlet: AnyOutlet, at_once: int) -> Sink:
    """The way out that an outlet's settings describe.

    Raises:
        ConfigError: a variable it names is not set, or the extra `broker` is not installed.
    """
    match outlet:
        case WebhookOutlet():
            secret = None if outlet.secret_env is None else secret_bytes(outlet.secret_env)
            return WebhookSink(Webhook(outlet.url, secret, outlet.timeout_s), outlet.scrub)
        case NatsOutlet():
            from data.outlets.broker import nats_sink

            return nats_sink(outlet, at_once)
        case KafkaOutlet():
            from data.outlets.broker import kafka_sink

            return kafka_sink(outlet, at_once)


def _channel(name: str, channel: AnyChannel) -> Plan:
    def wants(recorded: RecordedEvent) -> bool:
        said = notice(recorded)
        return said is not None and said.severity in channel.severities

    return Plan(
        name=f"notify:{name}",
        kinds=tuple(WORDS),
        open=lambda: NoticeSink(messenger(channel)),
        wants=wants,
    )
