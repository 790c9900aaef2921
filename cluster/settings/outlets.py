"""What leaves: notifications to people, events to other systems (operations.md, architecture.md).

Secrets stand in environment variables; the fields that end in `_env` name them.
"""

from typing import Annotated, Literal

from pydantic import Field

from cluster.settings.base import Section

Severity = Literal["page", "ticket", "success"]
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+[^\s#]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]


class Channel(Section):
    """What every way to reach people has."""

    severities: list[Severity] = ["page", "ticket", "success"]
    """What is sent here: `page` (act now), `ticket` (somebody should look), `success`."""
    timeout_s: float = Field(10.0, gt=0, le=300)
    """Longest silence of the receiver."""


class SlackChannel(Channel):
    """An incoming webhook of Slack, Mattermost or Rocket.Chat."""

    type: Literal["slack"]
    url_env: Variable
    """Variable that holds the webhook's address, which is a secret."""


class PagerDutyChannel(Channel):
    """PagerDuty's Events API, version 2."""

    type: Literal["pagerduty"]
    routing_key_env: Variable
    """Variable that holds the integration's routing key."""
    url: HttpUrl = "https://events.pagerduty.com/v2/enqueue"
    """Where events go; another address for a service that speaks the same."""
    severities: list[Severity] = ["page"]
    """As everywhere; what is `page` here wakes somebody."""


class EmailChannel(Channel):
    """Mail through an SMTP server."""

    type: Literal["email"]
    host: str
    """The SMTP server."""
    port: int = Field(587, ge=1, le=65535)
    """Its port: 587 with `starttls`, 465 with `tls`, 25 with neither."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """How the connection is protected."""
    username: str | None = None
    """Who logs in; nobody where absent."""
    password_env: Variable | None = None
    """Variable that holds the password."""
    sender: str = Field(pattern=r"^[^\s@<>,]+@[^\s@<>,]+$")
    """The address in `From`."""
    recipients: list[Annotated[str, Field(pattern=r"^[^\s@<>,]+@[^\s@<>,]+$")]] = Field(min_length=1)
    """The addresses in `To`."""
    severities: list[Severity] = ["page", "ticket"]
    """As everywhere."""


class WebhookChannel(Channel):
    """Any address that takes a signed JSON object."""

    type: Literal["webhook"]
    url: HttpUrl
    """Where it goes."""
    secret_env: Variable | None = None
    """Variable that holds the signing secret; unsigned where absent."""


AnyChannel = Annotated[SlackChannel | PagerDutyChannel | EmailChannel | WebhookChannel, Field(discriminator="type")]


class NotificationSettings(Section):
    """Who hears of what: channels by a name of your own. docs/notifications.md shows each type."""

    channels: dict[Name, AnyChannel] = {}
    """By name: `type` is `slack`, `pagerduty`, `email` or `webhook`."""
    console_url: str | None = None
    """Address that messages link to."""
    alert_every_s: int = Field(3600, ge=60)
    """An alert about one thing in one place (a full queue, a spool, drift) is recorded once within this time."""


class Outlet(Section):
    """What every outlet has."""

    kinds: list[str] = ["dataset.ready", "model.updated"]
    """Kinds of event that leave; an empty list means all."""
    tenant: str | None = None
    """Only this tenant's events; `None` means every tenant's."""
    start: Literal["now", "beginning"] = "now"
    """Where a new outlet begins: behind the newest event, or at the oldest."""
    scrub: bool = True
    """Replace personal data in bodies before they leave."""
    timeout_s: float = Field(10.0, gt=0, le=300)
    """Longest silence of the receiver."""


class WebhookOutlet(Outlet):
    """One signed POST an event."""

    type: Literal["webhook"]
    url: HttpUrl
    """Where it goes."""
    secret_env: Variable | None = None
    """Variable that holds the signing secret; unsigned where absent."""


class NatsOutlet(Outlet):
    """NATS JetStream, which acknowledges what it stored."""

    type: Literal["nats"]
    servers: list[str] = Field(["nats://127.0.0.1:4222"], min_length=1)
    """Addresses of the servers."""
    subject: str = Field("rayloop.{tenant}.{kind}", pattern=r"^[^\s*>]+$")
    """Subject of an event; `{tenant}`, `{workspace}` and `{kind}` are filled in."""
    stream: str = Field("rayloop", pattern=r"^[^\s.*>/\\]+$")
    """The stream that must take it; it is not made here."""
    user: str | None = None
    """Who logs in; nobody where absent."""
    password_env: Variable | None = None
    """Variable that holds the password."""


class KafkaOutlet(Outlet):
    """Kafka, or what speaks its protocol; waits for all in-sync replicas."""

    type: Literal["kafka"]
    servers: list[str] = Field(["127.0.0.1:9092"], min_length=1)
    """Bootstrap servers."""
    topic: str = Field("rayloop.{kind}", pattern=r"^[^\s]+$")
    """Topic of an event; `{tenant}`, `{workspace}` and `{kind}` are filled in."""


AnyOutlet = Annotated[WebhookOutlet | NatsOutlet | KafkaOutlet, Field(discriminator="type")]


class OutletSettings(Section):
    """Events that leave for other systems, and how hard it is tried; notifications are tried the same way."""

    to: dict[Name, AnyOutlet] = {}
    """By name: `type` is `webhook`, `nats` or `kafka`. docs/notifications.md shows each."""
    poll_s: float = Field(1.0, gt=0, le=60)
    """How often the log is read."""
    page_events: int = Field(200, ge=1, le=10_000)
    """Events read at a time, and handed to a broker at a time."""
    retry_first_s: float = Field(1.0, gt=0)
    """Pause after a first failure; it doubles with each further one…"""
    retry_max_s: float = Field(300.0, gt=0)
    """…up to this."""
    max_attempts: int = Field(12, ge=1)
    """How often a receiver may answer one event with a failure before it is put aside as a dead letter."""
    give_up_after_s: float = Field(86_400.0, gt=0)
    """A receiver that cannot be reached is waited for; an event older than this is then put aside."""
    lease_s: float = Field(30.0, gt=1)
    """How long a process that died keeps others from taking its place."""
