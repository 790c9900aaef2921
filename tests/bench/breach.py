"""From the decision to roll back until no replica has the candidate any more, with traffic, open streams and a drain.

    python -m tests.bench.breach [--repeats 10] [--streams 4]

Three routers over HTTP read the database every `serve.poll_ms` (its default). Streams of the candidate are open on each
of them, the third one drains, and users go on asking the other two while a guardrail rolls the candidate back. Prints
seconds from the recorded decision until every router, the draining one too, served its effect, and until the last
request of anybody went to the candidate. Exit code 1 above two seconds, or when an open stream was cut.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import httpx

from cluster.clock import SECOND_US, now_us
from serve.replicas import is_served
from serve.router import RouterApp
from serve.routes import read_route
from tests.serve.test_guardrails_live import PAUSED, OpenStream, Site, Trial, open_site
from tests.serve.upstream import Server

WITHIN_S = 2.0


class Traffic(threading.Thread):
    """Ever new users who ask one router, one after another."""

    def __init__(self, trial: Trial, url: str) -> None:
        super().__init__()
        self.trial, self.url = trial, url
        self.asked = 0
        self.last_us = 0
        """When the last request that the candidate got was sent."""
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        """Ask until stopped."""
        body = {"model": self.trial.key.agent, "messages": [{"role": "user", "content": "?"}]}
        with httpx.Client(headers=self.trial.site.headers, timeout=60) as client:
            while not self._stopping.is_set():
                sent_us = now_us()
                answer = client.post(f"{self.url}/v1/chat/completions", json=body | {"user": uuid.uuid4().hex})
                self.asked += 1
                if answer.headers["x-rayloop-arm"] == "candidate":
                    self.last_us = sent_us

    def stop(self) -> None:
        """End after the request under way."""
        self._stopping.set()
        self.join()


class Readback(threading.Thread):
    """Watches until every router says that it serves a route without the candidate."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        self.served_us = 0
        self.start()

    def run(self) -> None:
        """Read the rows again and again."""
        site = self.trial.site
        while True:
            route = read_route(site.database, self.trial.key)
            if not route.live and is_served(site.database, route, site.settings.serve.live_after_s):
                self.served_us = now_us()
                return
            time.sleep(0.02)


def roll_back(site: Site, streams: int) -> tuple[float, float, bool]:
    """One rollback: seconds until it was served everywhere, until the last request went astray; were streams whole?"""
    trial = site.begin(PAUSED)
    draining = Server(RouterApp(site.settings, default_engine_url=site.engine.url), lifespan="on", drain_s=60)
    with draining as url:
        opened = [OpenStream(trial, own) for own in (*site.urls, url) for _ in range(streams)]
        draining.stop()
        traffic, readback = [Traffic(trial, own) for own in site.urls], Readback(trial)
        try:
            trial.run()
            readback.join()
            time.sleep(WITHIN_S)  # whatever goes astray afterwards is seen too
        finally:
            for asking in traffic:
                asking.stop()
            trial.resume()
            for stream in opened:
                stream.join()
    decided_us = trial.decided().event.occurred_at_us
    astray_s = max(0.0, (max(asking.last_us for asking in traffic) - decided_us) / SECOND_US)
    served_s = (readback.served_us - decided_us) / SECOND_US
    return served_s, astray_s, all(stream.is_whole and stream.arm == "candidate" for stream in opened)


def main() -> int:
    """One rollback after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--streams", type=int, default=4, help="open on each router")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, open_site(Path(home), poll_ms=None) as site:
        found = [roll_back(site, options.streams) for _ in range(options.repeats)]
    served, astray, whole = ([one[n] for one in found] for n in range(3))
    print(
        f"{len(found)} rollbacks on two replicas and a draining one, {3 * options.streams} streams open: served "
        f"everywhere after {statistics.median(served):.2f} s, slowest {max(served):.2f} s; the last request to the "
        f"candidate after {max(astray):.2f} s at the latest; streams whole in {sum(whole)}"
    )
    return int(max(*served, *astray) > WITHIN_S or not all(whole))


if __name__ == "__main__":
    sys.exit(main())
