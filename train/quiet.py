"""Keeps the training libraries from printing, phoning home, drawing bars, and importing what nobody uses."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("sklearn", "scipy", "mlflow")
"""transformers and trl import these where they are installed: for object detection, for drafts of answers, to report by
themselves. Together they are nearly a third of what a training process would import before its first step."""


def quiet_libraries() -> None:
    """Call before the first use of transformers, datasets, peft or trl in a process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)  # its warnings quote whole prompts
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def import_trainers() -> None:
    """Import the trainers of all methods, as quickly as that goes."""
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
