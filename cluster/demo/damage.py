"""A damaged adapter for the second act: what was learned, turned round and made louder."""

import shutil
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
SCALED = "lora_B"
"""One of the two factors of every LoRA update; scaling it scales the update."""


def damage_adapter(source: Path, target: Path, factor: float) -> Path:
    """Copy an adapter with its update multiplied by `factor`; a negative one unlearns.

    Without what its training found of a few texts: an engine would see the damage when it loads it, and this act is
    about damage that shows only in what people say.
    """
    from safetensors.numpy import load_file, save_file

    from cluster.model_files import CANARY_FILE

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(CANARY_FILE))
    tensors = load_file(target / WEIGHTS)
    if not any(SCALED in name for name in tensors):
        raise ValueError(f"{source / WEIGHTS} holds no {SCALED} factors")
    scaled = {name: tensor * factor if SCALED in name else tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor.astype(tensors[name].dtype) for name, tensor in scaled.items()},
        target / WEIGHTS,
        {"format": "pt"},
    )
    return target
