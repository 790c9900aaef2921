"""Tells people what happened: e-mail, Slack and what speaks its webhooks, PagerDuty, or any signed webhook.

A notice is sent again when a process dies between sending it and writing down that it did. What each receiver
makes of that: PagerDuty folds notices of one key into one incident, a webhook's receiver can tell by its id,
mail carries the same `Message-ID`, which most clients fold; Slack shows it twice.
"""

import hashlib
import json
import os
import smtplib
import ssl
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any, Protocol

from cluster.clock import to_iso
from cluster.errors import ConfigError
from cluster.settings.outlets import (
    AnyChannel,
    EmailChannel,
    PagerDutyChannel,
    Severity,
    SlackChannel,
    WebhookChannel,
)
from cluster.webhook import DeliveryError, Webhook, deliver, environment_value, secret_bytes

PAGERDUTY_SEVERITY: dict[Severity, str] = {"page": "critical", "ticket": "warning", "success": "info"}
MAX_TEXT = 2000
MAX_TITLE = 200


@dataclass(frozen=True, slots=True)
class Notice:
    """Something people should hear of."""

    notice_id: str
    """The same whenever the same thing is told again."""
    severity: Severity
    title: str
    """One line."""
    text: str
    at_us: int
    facts: dict[str, Any] = field(default_factory=dict)
    """Ids and numbers for programs."""


class Messenger(Protocol):
    """One way to reach people."""

    def send(self, notice: Notice) -> None:
        """Tell them.

        Raises:
            DeliveryError: with what to do about it.
        """


@dataclass(frozen=True, slots=True)
class Slack:
    """An incoming webhook."""

    url: str
    timeout_s: float

    def send(self, notice: Notice) -> None:
        text = f"*{_mrkdwn(_line(notice.title))}*\n{_mrkdwn(notice.text[:MAX_TEXT])}"
        deliver(self.url, json.dumps({"text": f"[{notice.severity}] {text}"}).encode(), {}, self.timeout_s)


def _mrkdwn(text: str) -> str:
    """Slack reads `<!channel>` and `<url>` in texts; ours come from events."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_TITLE]


@dataclass(frozen=True, slots=True)
class PagerDuty:
    """Events API v2: one incident a notice."""

    url: str
    routing_key: str
    timeout_s: float

    def send(self, notice: Notice) -> None:
        payload = {
            "summary": _line(notice.title),
            "source": "rayloop",
            "severity": PAGERDUTY_SEVERITY[notice.severity],
            "timestamp": to_iso(notice.at_us),
            "custom_details": {"text": notice.text[:MAX_TEXT], **notice.facts},
        }
        document = {
            "routing_key": self.routing_key,
            "event_action": "trigger",
            "dedup_key": notice.notice_id[:255],
            "payload": payload,
        }
        deliver(self.url, json.dumps(document, default=str).encode(), {}, self.timeout_s)


@dataclass(frozen=True, slots=True)
class SignedWebhook:
    """The notice as a JSON object."""

    webhook: Webhook

    def send(self, notice: Notice) -> None:
        document = {
            "type": "notification",
            "id": notice.notice_id,
            "severity": notice.severity,
            "title": notice.title,
            "text": notice.text,
            "at": to_iso(notice.at_us),
            "facts": notice.facts,
        }
        self.webhook.send(notice.notice_id, json.dumps(document, default=str).encode())


@dataclass(frozen=True, slots=True)
class Email:
    """Plain text through an SMTP server."""

    settings: EmailChannel
    password: str | None

    def send(self, notice: Notice) -> None:
        try:
            with self._connect() as server:
                if self.settings.username:
                    server.login(self.settings.username, self.password or "")
                server.send_message(self._message(notice))
        except smtplib.SMTPRecipientsRefused as error:
            raise DeliveryError(f"no recipient was taken: {error.recipients}", "failed") from None
        except smtplib.SMTPResponseException as error:
            shown = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else ""
            raise DeliveryError(f"SMTP {error.smtp_code} {shown}"[:300], "failed") from None
        except (OSError, smtplib.SMTPException) as error:
            raise DeliveryError(f"{self.settings.host}:{self.settings.port}: {error}", "unreachable") from None

    def _connect(self) -> smtplib.SMTP:
        host, port, timeout_s = self.settings.host, self.settings.port, self.settings.timeout_s
        if self.settings.security == "tls":
            return smtplib.SMTP_SSL(host, port, timeout=timeout_s, context=ssl.create_default_context())
        server = smtplib.SMTP(host, port, timeout=timeout_s)
        if self.settings.security == "starttls":
            try:
                server.starttls(context=ssl.create_default_context())
            except BaseException:
                server.close()
                raise
        return server

    def _message(self, notice: Notice) -> EmailMessage:
        message = EmailMessage(policy=SMTP)
        message["From"] = self.settings.sender
        message["To"] = ", ".join(self.settings.recipients)
        message["Subject"] = f"[{notice.severity}] {_line(notice.title)}"
        name = hashlib.sha256(notice.notice_id.encode()).hexdigest()[:32]
        message["Message-ID"] = f"<{name}@{self.settings.sender.rpartition('@')[2]}>"
        facts = "\n".join(f"{key}: {value}" for key, value in notice.facts.items())
        message.set_content(f"{notice.text}\n\n{facts}\n{to_iso(notice.at_us)}\n")
        return message


def messenger(channel: AnyChannel) -> Messenger:
    """The way to reach people that a channel's settings describe.

    Raises:
        ConfigError: a variable it names is not set.
    """
    match channel:
        case SlackChannel():
            return Slack(_secret_url(channel.url_env), channel.timeout_s)
        case PagerDutyChannel():
            return PagerDuty(channel.url, environment_value(channel.routing_key_env), channel.timeout_s)
        case EmailChannel():
            password = None if channel.password_env is None else environment_value(channel.password_env)
            return Email(channel, password)
        case WebhookChannel():
            secret = None if channel.secret_env is None else secret_bytes(channel.secret_env)
            return SignedWebhook(Webhook(channel.url, secret, channel.timeout_s))


def _secret_url(variable: str) -> str:
    url = environment_value(variable)
    if not url.startswith(("https://", "http://")):
        raise ConfigError(variable, "…", "must be an http or https address", "copy the webhook's whole address")
    return url


def trial_notice(severity: Severity, at_us: int) -> Notice:
    """What `rayloop notify test` sends."""
    text = "Somebody ran `rayloop notify test`. If you can read this, notifications of this severity arrive here."
    return Notice(f"test:{os.getpid()}:{at_us}", severity, "Rayloop: a test notification", text, at_us)
