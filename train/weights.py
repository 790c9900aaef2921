"""What a training changes and leaves behind: the tensors of an adapter, or those of the whole model.

LoRA and QLoRA train an adapter (with a score head, for a reward model); full fine-tuning trains every
weight and writes an ordinary model directory. Everything else treats the two alike.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.model_files import adapter_digest, describe_base

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"format": "pt"}
MODEL_WEIGHTS = "model.safetensors"


def has_adapter(model: Any) -> bool:
    """False for a model whose own weights are trained."""
    return hasattr(model, "peft_config")


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """A copy of the trained weights: an adapter's under PEFT's names for files, else every parameter once."""
    if has_adapter(model):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    else:
        state = dict(model.named_parameters())  # tied weights have one name
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def put_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put weights from `trained_tensors` back into the model they are of."""
    if has_adapter(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, dict(tensors), adapter_name="default")
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def write_checkpoint(folder: Path, model: Any, base_model: str) -> None:
    """The trained weights, for the run that goes on; an adapter's files are what PEFT loads."""
    if has_adapter(model):
        write_adapter(folder, trained_tensors(model), adapter_config(model), base_model)
    else:
        save_file(trained_tensors(model), folder / MODEL_WEIGHTS, metadata=PLAIN)


def weights_file(folder: Path) -> Path:
    """The file of trained weights in a checkpoint."""
    adapter = folder / ADAPTER_WEIGHTS
    return adapter if adapter.is_file() else folder / MODEL_WEIGHTS


def write_result(folder: Path, model: Any, tokenizer: Any, base_model: str, about: Mapping[str, str]) -> None:
    """What a run leaves: an adapter directory, or a whole model with its tokenizer; `about` as in `write_adapter`."""
    if has_adapter(model):
        write_adapter(folder, trained_tensors(model), adapter_config(model), base_model, about)
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def result_digest(folder: Path) -> str:
    """SHA-256 of an adapter (as the registry takes it), or of a whole model's files.

    Raises:
        InputError: neither is there.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_digest(folder)
    return describe_base(folder)[1].removeprefix("sha256:")


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: Mapping[str, Any],
    base_model: str,
    about: Mapping[str, str] = PLAIN,
) -> None:
    """An adapter directory that PEFT and vLLM load; equal weights give equal bytes.

    `about` goes into the header of the weights, so that their digest covers it; one entry, since safetensors
    writes several in an order that changes.

    PEFT's own writer puts the target modules in an order that changes from process to process, and the
    absolute path of the base model, which would make the digest of an adapter depend on where it was made.
    """
    config = {key: sorted(value) if isinstance(value, set | list | tuple) else value for key, value in lora.items()}
    config |= {"base_model_name_or_path": _portable(base_model), "inference_mode": True, "revision": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata=dict(about))


def adapter_config(model: Any) -> dict[str, Any]:
    """The LoRA configuration of a model as plain values."""
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    config["task_type"] = str(getattr(config["task_type"], "value", config["task_type"]))
    return config


@contextmanager
def start_of(model: Any, load_base: Callable[[], Any]) -> Iterator[Any]:
    """The base that a trained model stands on: adapters off for the block, or the base loaded anew."""
    if has_adapter(model):
        with model.disable_adapter():
            yield model
    else:
        yield load_base().to(model.device).eval()


def _portable(base_model: str) -> str:
    path = Path(base_model).expanduser()
    return path.resolve().name if path.is_dir() else base_model
