"""Reads a LoRA adapter from disk and refuses, with the reason, everything that could harm the engine.

Files are read once, whole, into memory; the digest is taken of the same bytes that are loaded, so nothing
can change in between. Pickles are never read.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.engines.adapter_source import AdapterError, read_file, read_optional

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CANARY_FILE = "canary.json"  # cluster.model_files.CANARY_FILE
MAX_CONFIG_BYTES = 2**20
UNSUPPORTED = (
    "use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "target_parameters", "layer_replication", "alora_invocation_tokens", "velora_config", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Fields of peft's LoraConfig that change what the two matrices mean; set, the adapter is refused."""
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class LoraPair:
    """What one linear layer gains, ``x @ a.T @ b.T``: a is [R, in], b is [out, R] with the scale in it."""

    a: "Tensor"
    b: "Tensor"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read: its configuration, its layers and the digest of its bytes."""

    location: str
    """The folder or the URI it was read from."""
    sha256: str
    rank: int
    base_model: str | None
    config: dict[str, Any] = field(repr=False)
    pairs: dict[str, LoraPair] = field(repr=False)
    """By the name of the linear layer in the base model."""


def read_bytes(location: Path | str, max_mb: float = 8192) -> dict[str, bytes]:
    """The two files that make an adapter, by name.

    Raises:
        AdapterError: one is missing, too long or cannot be read.
    """
    limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: int(max_mb * 2**20)}
    return {name: read_file(str(location), name, limit) for name, limit in limits.items()}


def read_adapter(location: Path | str, *, max_rank: int, max_mb: float = 8192) -> AdapterFiles:
    """Read an adapter as peft writes it, from a folder or an object store.

    Raises:
        AdapterError: missing, truncated, over rank, not finite, or of a kind that is not plain LoRA.
    """
    files = read_bytes(location, max_mb)
    config_bytes, weight_bytes = files[CONFIG_FILE], files[WEIGHTS_FILE]
    config = _parse_config(config_bytes)
    check_whole(weight_bytes)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if max(ranks) > max_rank:
        raise AdapterError(f"its rank {max(ranks)} is over the engine's {max_rank}; raise `engine.max_rank`")
    pairs = _pairs(_tensors(weight_bytes), config, max_rank)
    digest = digest_of(files)
    rank = max(pair.a.shape[0] for pair in pairs.values())
    return AdapterFiles(str(location), digest, rank, config.get("base_model_name_or_path") or None, config, pairs)


def read_canary(location: Path | str) -> list[dict[str, Any]]:
    """What the adapter's training found of a few texts: `ids`, and `logprobs` of those after the first; or nothing.

    Raises:
        AdapterError: the file is of another shape.
    """
    data = read_optional(str(location), CANARY_FILE, MAX_CONFIG_BYTES)
    if data is None:
        return []
    try:
        rows = json.loads(data)
        whole = all(len(row["ids"]) == len(row["logprobs"]) + 1 for row in rows)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise AdapterError(f"{CANARY_FILE} does not hold ids and log-probs")
    return list(rows)


def digest_of(files: dict[str, bytes]) -> str:
    """The adapter digest of files already in memory (see cluster.model_files.adapter_digest)."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def check_whole(data: bytes) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        AdapterError: it is shorter or longer, or has no readable header.
    Source: https://huggingface.co/docs/safetensors (format)
    """
    if len(data) < 8:
        raise AdapterError(f"{WEIGHTS_FILE} is truncated: {len(data)} bytes hold no header")
    (header_length,) = struct.unpack("<Q", data[:8])
    if header_length > len(data) - 8:
        raise AdapterError(f"{WEIGHTS_FILE} is truncated: its header of {header_length} bytes is cut off")
    try:
        header = json.loads(data[8 : 8 + header_length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise AdapterError(f"{WEIGHTS_FILE} has no readable safetensors header") from None
    expected = 8 + header_length + max(ends, default=0)
    if len(data) != expected:
        state = "truncated" if len(data) < expected else "longer than its header says"
        raise AdapterError(f"{WEIGHTS_FILE} is {state}: {len(data)} bytes, {expected} expected")


def _parse_config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except ValueError:
        raise AdapterError(f"{CONFIG_FILE} is not JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE} does not describe a LoRA adapter")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AdapterError(f"{CONFIG_FILE} has no rank `r`")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterError(f"{CONFIG_FILE} has no `lora_alpha`")
    used = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise AdapterError(f"{CONFIG_FILE} uses {', '.join(used)}, which this engine does not serve")
    return config


def _tensors(data: bytes) -> "dict[str, Tensor]":
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} cannot be loaded ({error})") from None
    return tensors


def _pairs(tensors: "dict[str, Tensor]", config: dict[str, Any], max_rank: int) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterError(f"{WEIGHTS_FILE} holds {key!r}, which is not part of a plain LoRA adapter")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise AdapterError(f"{key} is not a matrix of real numbers")
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{key} holds numbers that are not finite")
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not sides:
        raise AdapterError(f"{WEIGHTS_FILE} holds no layers")
    return {module: _pair(module, pair, config, max_rank) for module, pair in sorted(sides.items())}


def _pair(module: str, pair: "dict[str, Tensor]", config: dict[str, Any], max_rank: int) -> LoraPair:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{module} has only one of its two matrices")
    rank = pair["A"].shape[0]
    if pair["B"].shape[1] != rank:
        raise AdapterError(f"{module} has matrices of different ranks, {rank} and {pair['B'].shape[1]}")
    if rank > max_rank:
        raise AdapterError(f"its rank {rank} at {module} is over the engine's {max_rank}; raise `engine.max_rank`")
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraPair(pair["A"].contiguous(), (pair["B"] * scale).contiguous())


def _pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    """The value peft would pick for a module: the first pattern that ends its name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)
