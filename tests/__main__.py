"""`make test`: all tests, in three processes beside each other.

    python -m tests [arguments of pytest]

One process has what needs a Ray cluster, so there is one; the others have the live side, which waits for sockets,
databases and clocks for much of its time, and the rest. A line is printed when its file is done.
The exit code is that of the worst part; a part in which the arguments select nothing does not count, unless all do.
"""

import subprocess
import sys
import threading
from typing import IO

import pytest

from tests.conftest import PARTS


def main(arguments: list[str]) -> int:
    """Run all parts to their end and print what each said."""
    command = [sys.executable, "-m", "pytest", "--durations=15", *arguments]
    running = {
        part: subprocess.Popen(
            [*command, f"--part={part}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for part in PARTS
    }
    readers = [threading.Thread(target=_print_lines, args=(part, one.stdout)) for part, one in running.items()]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    codes = {one.wait() for one in running.values()}
    return max(codes - {int(pytest.ExitCode.NO_TESTS_COLLECTED)} or codes)


def _print_lines(part: str, lines: IO[str] | None) -> None:
    for line in lines or ():
        print(f"{part:>5} | {line}", end="", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
