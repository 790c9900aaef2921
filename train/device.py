"""Where a training computes and in which arithmetic, decided once at its start."""

import os
from dataclasses import dataclass, replace
from typing import Literal

from cluster.errors import InputError

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """A resolved device."""

    type: Literal["cpu", "cuda"]
    precision: Precision
    threads: int
    attention: str
    """Attention implementation of `transformers`. Eager on a CPU: for short rows its plain matrix
    products are 2.5 times as fast as the fused kernel in bf16."""


def resolve_device(device: str = "auto", precision: str = "auto", threads: int = 0) -> Device:
    """The device for these settings.

    Raises:
        InputError: `cuda` was asked for and there is none, or fp16 on a CPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("training.device", device, "has no GPU here", "use a node with one or `--device cpu`")
    kind: Literal["cpu", "cuda"] = "cuda" if has_gpu and device != "cpu" else "cpu"
    if precision == "fp16" and kind == "cpu":
        raise InputError("training.precision", precision, "needs a GPU", "use bf16 or fp32")
    chosen = _best_precision(kind) if precision == "auto" else precision
    return Device(kind, chosen, threads or cpu_cores(), "eager" if kind == "cpu" else "sdpa")  # type: ignore[arg-type]


def for_packing(device: Device) -> Device:
    """`device` with flash attention, which keeps packed examples apart, where its arithmetic and installation allow."""
    able = device.type == "cuda" and device.precision != "fp32" and has_flash_attention()
    return replace(device, attention="flash_attention_2") if able else device


def has_flash_attention() -> bool:
    """True where the package `flash-attn` is installed and fits the GPU."""
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def num_workers() -> int:
    """Processes that train together: those of the process group, where there is one."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best_precision(kind: str) -> Precision:
    import torch

    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
