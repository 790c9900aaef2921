"""Runs a command and ends it, with everything it started, when whoever started this goes away.

`python -I launcher.py COMMAND…`, with a pipe as standard input that nobody writes to: its end of file is the
end of the parent, however that came about. A signal at the parent's death (`PR_SET_PDEATHSIG`) would reach
one process only, and would come already when the thread that started it ends.
"""

import os
import select
import signal
import subprocess
import sys

POLL_S = 0.5
GRACE_S = 5.0  # vLLM closes its engine on SIGTERM; what is left then is killed


def main() -> int:
    """Until the command ends or standard input does."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end(child))
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 1):
            _end(child)
    _kill_group(child.pid)
    return child.returncode


def _end(child: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(GRACE_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
