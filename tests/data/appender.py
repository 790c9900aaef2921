"""A child process that appends through `GroupCommit` and says on standard output what was acknowledged."""

import sys
import threading
from concurrent.futures import Future

from cluster.database import connect
from cluster.settings import load_settings
from data.events import Event
from data.group_commit import GroupCommit
from data.log import EventLog, Verdict

WAITING = 8
"""Submissions in flight, from several threads."""


def main(url: str, run: str) -> None:
    """Append until killed; every acknowledged id is one line."""
    settings = load_settings(database={"url": url})[0]
    commit = GroupCommit(EventLog(connect(settings)), settings.log)
    print("ready", flush=True)

    def work(thread: int) -> None:
        number = 0
        while True:
            ids = [f"{run}-{thread}-{number + i}" for i in range(5)]
            number += 5
            body = {"type": "thumbs_up"}
            events = [Event("feedback", "acme", "main", body, event_id=name) for name in ids]
            future: Future[list[Verdict]] = commit.submit(events)
            assert all(verdict.status == "accepted" for verdict in future.result())
            sys.stdout.write("".join(f"{name}\n" for name in ids))
            sys.stdout.flush()

    for thread in range(WAITING):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
