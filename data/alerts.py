"""Events for the people who run this: graders that drift apart, a spool that grows, a queue that is full.

They travel like every other event, so whatever is notified of events is notified of them (`data.outlets.notices`). An
alert about the log itself arrives when the log is back; at the moment it happens the metrics say so.
"""

import os
import socket
from typing import Any

from cluster.clock import SECOND_US, now_us
from cluster.settings import Settings
from data.events import Event, parse_body


def alert(
    settings: Settings, name: str, reason: str, facts: dict[str, Any] | None = None, source: str | None = None
) -> Event:
    """An alert of the configured tenant, once within `notifications.alert_every_s` for each name and source.

    `source` is this process where none is named.
    """
    at_us = now_us()
    source = source or f"{socket.gethostname()}:{os.getpid()}"
    period = at_us // (settings.notifications.alert_every_s * SECOND_US)
    body = {"name": name, "source": source, "reason": reason, "facts": facts or {}}
    return Event(
        "operator.alert",
        settings.tenant,
        settings.workspace,
        parse_body("operator.alert", body),
        event_id=f"alert:{name}:{source}:{period}"[:128],
        occurred_at_us=at_us,
    )
