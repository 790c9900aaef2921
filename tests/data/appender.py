"""A child process that appends through `GroupCommit`, sends much of it again, and says what was acknowledged."""

import json
import random
import sys
import threading

from cluster.database import connect
from cluster.settings import load_settings
from data.events import Event
from data.group_commit import GroupCommit
from data.log import EventLog

THREADS = 8
"""Clients, each with one body in flight."""
ITEMS = 25
"""Events in one body."""
RETRIES = 0.25
"""Share of bodies that were sent before: with chance and first bodies, a fifth and more of what is acknowledged."""


def main(url: str, first_json: str, seed: str) -> None:
    """Append until killed. One line for each acknowledged body: client, number, and the verdicts' letters.

    `first_json` holds the number at which each client begins: where the last process may have been cut off.
    """
    settings = load_settings(database={"url": url})[0]
    commit = GroupCommit(EventLog(connect(settings, migrate=False)), settings.log)
    print("ready", flush=True)

    def work(client: int, number: int) -> None:
        chance = random.Random(f"{seed}-{client}")
        while True:
            again = number and chance.random() < RETRIES
            chosen = chance.randrange(number) if again else number
            number += not again
            verdicts = commit.append(events(client, chosen))
            sys.stdout.write(f"{client} {chosen} {''.join(verdict.status[0] for verdict in verdicts)}\n")
            sys.stdout.flush()

    for client, number in enumerate(json.loads(first_json)):
        threading.Thread(target=work, args=(client, number), daemon=True).start()
    threading.Event().wait()


def events(client: int, number: int) -> list[Event]:
    """The body of a client with this number; the same every time."""
    body = {"type": "thumbs_up"}
    names = (f"{client}-{number}-{item}" for item in range(ITEMS))
    return [Event("feedback", "acme", "main", body, event_id=name, interaction_id=name) for name in names]


if __name__ == "__main__":
    main(*sys.argv[1:])
