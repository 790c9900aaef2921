"""The files of adapters and base models on disk: which they are, and the digests by which they are known."""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from cluster.errors import InputError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CANARY_FILE = "canary.json"
"""Beside an adapter, where its training wrote it: log-probs of a few texts (`train.canary`)."""
BASE_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
CHUNK_BYTES = 1 << 20
NAME_ADAPTER = "name a directory written by `rayloop train`"
NAME_BASE = "name a transformers model directory or a hub id"


def adapter_digest(path: str | Path) -> str:
    """SHA-256 over the names and the SHA-256 of the adapter's files, in order of name.

    Raises:
        InputError: a file is missing.
    """
    total = hashlib.sha256()
    for name in sorted(ADAPTER_FILES):
        file = Path(path) / name
        if not file.is_file():
            raise InputError("adapter", str(path), f"has no {name}", NAME_ADAPTER)
        total.update(name.encode() + b"\0" + file_digest(file))
    return total.hexdigest()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, checked to be LoRA with a rank.

    Raises:
        InputError: missing, not JSON or not LoRA.
    """
    file = folder / ADAPTER_FILES[0]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("adapter", str(folder), f"has no readable {file.name} ({error})", NAME_ADAPTER) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise InputError("adapter", str(folder), "is not a LoRA adapter", NAME_ADAPTER)
    return config


def describe_base(base_model: str | Path) -> tuple[str, str]:
    """Where a base model is (absolute path or hub id) and its revision (digest of its files or commit).

    Raises:
        InputError: a path that does not hold a model.
    """
    path = Path(base_model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError("base_model", str(base_model), "holds no config.json", NAME_BASE)
        return str(path.resolve()), _directory_digest(path)
    if path.is_absolute() or str(base_model).startswith((".", "~")) or str(base_model).count("/") > 1:
        raise InputError("base_model", str(base_model), "does not exist", NAME_BASE)
    return str(base_model), _hub_commit(str(base_model))


def _directory_digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted({file for pattern in BASE_FILES for file in folder.glob(pattern)}):
        total.update(file.name.encode() + b"\0" + file_digest(file))
    return f"sha256:{total.hexdigest()}"


def _hub_commit(model_id: str) -> str:
    """Commit of the hub model in the local cache; `main` where it was never downloaded."""
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"))
    reference = cache.expanduser() / f"models--{model_id.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else "main"


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def move_into_place(source: Path, final: Path) -> None:
    """One rename, so that nobody sees half a directory; a directory that stands in the way is replaced."""
    if final.exists():
        trash = final.with_name(f".replaced-{uuid.uuid4().hex}")
        os.replace(final, trash)
        shutil.rmtree(trash)
    try:
        os.replace(source, final)
    except OSError:
        if not final.is_dir():  # else another process put the same content there
            raise
