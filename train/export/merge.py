"""Base and adapter as one ordinary model directory."""

from pathlib import Path
from typing import Any

import torch

from train.models import load_adapter, load_tokenizer, load_whole_model
from train.quiet import quiet_libraries


def write_merged(folder: Path, base_model: str, adapter: Path | None) -> None:
    """Write the merged weights, in the base's own precision, and the base's tokenizer.

    The sum is taken in 32 bits: an adapter's changes are smaller than the steps of 16-bit weights.

    Raises:
        InputError: the base cannot be loaded, or the adapter is not one of it.
    """
    model, dtype = with_adapter(base_model, adapter)
    if adapter is not None:
        model = model.merge_and_unload()
    model.to(dtype).save_pretrained(folder)
    load_tokenizer(base_model).save_pretrained(folder)


def with_adapter(base_model: str, adapter: Path | None) -> tuple[Any, torch.dtype]:
    """The base in 32 bits under its adapter, not merged, and the precision its files have."""
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = AutoConfig.from_pretrained(base_model).dtype or torch.float32
    model = load_whole_model(AutoModelForCausalLM, base_model, dtype=torch.float32)
    if adapter is not None:
        model = load_adapter(model, str(adapter), base_model)
    return model.eval(), stored
