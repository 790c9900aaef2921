"""Imports the trainers as quickly as that goes: without what transformers would import and nobody uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("sklearn", "scipy", "mlflow")
"""transformers and trl import these where they are installed: for object detection, for drafts of answers, to report by
themselves. Together they are nearly a third of what a training process would import before its first step."""


def import_trainers() -> None:
    """Import the trainers of all methods."""
    with hidden(UNUSED):
        import train.methods  # noqa: F401


@contextmanager
def hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Make packages look as if they were not installed; those that are imported already stay."""
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # `None` is how Python spells "not there"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
