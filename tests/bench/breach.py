"""From the decision to roll back until no replica has the candidate any more, with traffic and open streams.

    python -m tests.bench.breach [--repeats 10]

Two routers over HTTP read the database every `serve.poll_ms` (its default); a candidate that fails every request is
rolled back by its guardrail. Prints seconds from the recorded decision until both routers had shown its effect.
Exit code 1 above two seconds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from tests.serve.test_guardrails_live import CASES, open_site

WITHIN_S = 2.0


def main() -> int:
    """One rollback after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    taken = []
    with tempfile.TemporaryDirectory() as home, open_site(Path(home), poll_ms=None) as site:
        for _ in range(options.repeats):
            trial = site.begin(CASES[0])
            trial.run()
            taken.append(trial.confirmed_s)
    print(
        f"{len(taken)} rollbacks on two replicas: median {statistics.median(taken):.2f} s, slowest {max(taken):.2f} s"
    )
    return int(max(taken) > WITHIN_S)


if __name__ == "__main__":
    sys.exit(main())
