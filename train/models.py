"""The model a training starts from: base, tokenizer, and the shape of what is trained on top."""

import importlib.util
from typing import Any

import torch
from safetensors import SafetensorError

from cluster.errors import InputError
from cluster.model_files import adapter_digest
from cluster.settings.training import HeadWeights
from train.config import TrainConfig
from train.device import Device

SCORE_HEAD = "score."
"""Where weights begin that a reward model gets anew."""


def load_tokenizer(base_model: str) -> Any:
    """The tokenizer of a base model, with a padding token.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise _unloadable(base_model, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unloadable(base_model: str, error: Exception) -> InputError:
    cause = str(error).strip().splitlines()[0]
    return InputError(
        "base_model", base_model, f"cannot be loaded ({cause})", "name a transformers directory or hub id"
    )


def check_weights(config: TrainConfig, device: Device) -> None:
    """Refuse QLoRA where its arithmetic does not exist.

    Raises:
        InputError: no GPU here, or no bitsandbytes.
    """
    if config.weights != "qlora":
        return
    if device.type != "cuda":
        raise InputError("training.weights", "qlora", "needs a GPU, there is none here", "use lora, or a GPU node")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("training.weights", "qlora", "needs bitsandbytes", 'install it: pip install -e ".[qlora]"')


def load_base(config: TrainConfig, device: Device) -> Any:
    """The base model in the arithmetic of the device, with one score head or four for a reward model.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": _dtype(config, device), "attn_implementation": device.attention}
    if config.weights == "qlora":
        options["quantization_config"] = _four_bits(options["dtype"])
    loader = AutoModelForCausalLM
    if config.scores:
        heads = 1 if config.method == "reward" else len(HeadWeights.model_fields)
        loader, options = AutoModelForSequenceClassification, {**options, "num_labels": heads}
    return load_whole_model(loader, config.base_model, **options)


def load_whole_model(loader: Any, base_model: str, **options: Any) -> Any:
    """A model by one of transformers' loaders, from safetensors, with all its weights but a new score head.

    Raises:
        InputError: it cannot be loaded, or lacks weights, which transformers would draw at random.
    """
    options |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    try:
        model, found = loader.from_pretrained(base_model, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _unloadable(base_model, error) from None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(SCORE_HEAD))
    if missing:
        rule = f"lacks {len(missing)} of its weights ({missing[0]}, …)"
        raise InputError("base_model", base_model, rule, "name a complete model")
    return model


def load_start(config: TrainConfig, device: Device) -> Any:
    """What the run starts from: the base, or with `init_adapter` a trainable PEFT model.

    Raises:
        InputError: the base cannot be loaded, has no such layers as are to be trained, or the adapter is not one of it.
    """
    model = load_base(config, device)
    if not config.init_adapter:
        if config.weights != "full":
            check_targets(model, config)
        return model
    return load_adapter(model, config.init_adapter, config.base_model, trainable=True)


def check_targets(model: Any, config: TrainConfig) -> None:
    """Refuse layers that a base has not; PEFT would leave them out without a word where it finds others.

    Raises:
        InputError: one of `lora.target_modules` is the name of none.
    """
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    wanted = config.lora.target_modules
    missing = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        rule = f"{missing[0]!r} is no linear layer of {config.base_model}"
        raise InputError("training.lora.target_modules", list(wanted), rule, f"name some of {known}")


def load_adapter(model: Any, adapter: str, base_model: str, *, trainable: bool = False) -> Any:
    """A PEFT model.

    Raises:
        InputError: no adapter in safetensors there, or not one of this base.
    """
    adapter_digest(adapter)  # PEFT would read a pickle instead
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise InputError(
            "adapter",
            adapter,
            f"does not fit base model {base_model!r} ({cause})",
            "name an adapter that was trained on it",
        ) from None


def _dtype(config: TrainConfig, device: Device) -> torch.dtype:
    if device.type == "cpu" or device.precision == "fp32" or config.weights == "full":
        return torch.float32  # weights that are trained keep the precision of their updates
    return torch.float16 if device.precision == "fp16" else torch.bfloat16


def _four_bits(dtype: torch.dtype) -> Any:
    """Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, sections 2 and 3"""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def lora_config(config: TrainConfig, task: str) -> Any:
    """The adapter's shape; a reward model's score head is part of its adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type=task,
    )
