"""Log-probabilities of the reference model, kept for the next run on the same data from the same start.

They depend on the base, the adapter a run goes on from, the token ids, and the arithmetic, and on nothing that
a sweep varies: sixteen trials need them once.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cluster.model_files import adapter_digest, describe_base
from train.config import TrainConfig
from train.device import Device

KEPT = 64  # files; the least recently used go first
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


@dataclass(frozen=True)
class References:
    """A folder of them, for one start and one arithmetic."""

    folder: Path
    start: str
    """Digest of the model and of how it computes."""

    def key(self, rows: Any, columns: Sequence[str], batch_size: int) -> str:
        """Name of the file for these rows, a `datasets.Dataset`."""
        total = hashlib.sha256(json.dumps([self.start, list(columns), batch_size]).encode())
        for name in IDS:
            if name in rows.column_names:
                total.update(json.dumps([name, list(rows[name])]).encode())
        return total.hexdigest()

    def read(self, key: str, count: int) -> dict[str, list[float]] | None:
        """The columns under a key; `None` where there are none, or no whole ones."""
        file = self.folder / f"{key}.safetensors"
        try:
            columns = {name: tensor.tolist() for name, tensor in load_file(file).items()}
            file.touch()
        except (OSError, SafetensorError):  # missing or torn: computed anew
            return None
        return columns if columns and all(len(values) == count for values in columns.values()) else None

    def write(self, key: str, columns: Mapping[str, Sequence[float]]) -> None:
        """Keep columns under a key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{key}.{uuid.uuid4().hex}"
        save_file({name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}, draft)
        draft.replace(self.folder / f"{key}.safetensors")
        with contextlib.suppress(FileNotFoundError):  # another run tidies up as well
            for old in sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink()


def references_of(config: TrainConfig, device: Device) -> References | None:
    """The cache for a run; `None` where the configuration names no folder."""
    if config.reference_cache is None:
        return None
    adapter = adapter_digest(config.init_adapter) if config.init_adapter else ""
    start = [describe_base(config.base_model)[1], adapter, config.weights, device.type, device.precision]
    return References(config.reference_cache, json.dumps([*start, device.attention, config.shared_prompt]))
