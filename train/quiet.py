"""Keeps the training libraries from printing, phoning home and drawing bars."""

import logging
import os


def quiet_libraries() -> None:
    """Call before the first use of transformers, datasets, peft or trl in a process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)  # its warnings quote whole prompts
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
