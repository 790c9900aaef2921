"""A command that is ended early, by Ctrl-C or SIGTERM, says how to go on with what it did."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def goes_on_with(command: str) -> Iterator[None]:
    """Names the command that takes the block up again, for the last line (`last_line`) of one that is interrupted."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(f"go on with: {command}")
        raise


def last_line(word: str, error: BaseException) -> str:
    """What an interrupted command prints."""
    return "; ".join([word, *getattr(error, "__notes__", ())])
