"""A command that is ended early, by Ctrl-C or SIGTERM, says how to go on with what it did."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

terminated = threading.Event()
"""SIGTERM came. Whatever waits for Ray then learns of an exit with a code that Ray has made up."""


@contextmanager
def goes_on_with(command: str) -> Iterator[None]:
    """Prints the command that takes the block up again, as the last line of one that is interrupted."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if terminated.is_set() or isinstance(error, KeyboardInterrupt):
            word = "terminated" if terminated.is_set() else "interrupted"
            print(f"{word}; go on with: {command}", file=sys.stderr)
        raise
