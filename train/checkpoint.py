"""What a killed training needs to go on as if nothing had happened.

A checkpoint is a folder of safetensors and JSON: trained weights, optimiser moments, schedule, position
in the data, and the random state of every worker. Rank 0 writes it beside its final place and moves it
there in one rename, so a folder named `step-…` is always whole. Nothing is pickled, nothing is unpickled.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import ConflictError, InputError
from train.agree import on_first
from train.files import written_whole
from train.weights import put_tensors, weights_file, write_checkpoint

log = logging.getLogger(__name__)

OPTIMIZER, RANDOM, STATE, BEST = "optimizer.safetensors", "random.safetensors", "state.json", "best"
BEST_WEIGHTS = "weights.safetensors"
TRAINER_STATE = "trainer_state.json"  # the name under which transformers looks for it


def save_checkpoint(trainer: Any, root: Path, config_digest: str, keep: int = 1) -> Path:
    """Write the trainer's state to `root/step-…`; every rank calls it, rank 0 writes, and all raise what it raises.

    Raises:
        InputError: the folder cannot be written.
    """
    random_states = gather_random_state(trainer)
    folder = root / f"step-{trainer.state.global_step:08d}"

    def write() -> None:
        with written_whole(folder) as scratch:
            write_checkpoint(scratch, trainer.model, trainer.base_model)
            _save_optimizer(trainer, scratch, config_digest)
            save_file(random_states, scratch / RANDOM)
            trainer.state.save_to_json(str(scratch / TRAINER_STATE))
            if trainer.best is not None:
                (scratch / BEST).mkdir()
                save_file(trainer.best.tensors, scratch / BEST / BEST_WEIGHTS)
        for old in list_checkpoints(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    on_first(write)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / STATE).is_file())


def last_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`."""
    found = list_checkpoints(root)
    return found[-1] if found else None


def discard_all(root: Path) -> None:
    """Remove the checkpoints of a run that has ended well."""
    shutil.rmtree(root, ignore_errors=True)


def digest_of(config_digest: str, *splits: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of a configuration and of the tokenised rows it learns from."""
    total = hashlib.sha256(config_digest.encode())
    for rows in splits:
        total.update(json.dumps(list(rows), sort_keys=True).encode())
    return total.hexdigest()


def check_resumable(folder: Path, config_digest: str) -> None:
    """Refuse to go on with another configuration: the result would be neither run's.

    Raises:
        InputError: not a checkpoint.
        ConflictError: it was written under another configuration.
    """
    if not (folder / STATE).is_file():
        raise InputError("resume", str(folder), "is no checkpoint", "name a folder `step-…` of a training")
    written = json.loads((folder / STATE).read_text())["config"]
    if written != config_digest:
        raise ConflictError(
            f"checkpoint {folder.name} belongs to another configuration or dataset; resume with the same or start anew"
        )


def adopt(source: Path, root: Path, config_digest: str, learning_rate: float) -> Path:
    """Make another run's checkpoint one of a run under `root`, which goes on with a learning rate of its own.

    Source: Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846, section 3: exploit, then explore
    """
    state = json.loads((source / STATE).read_text())
    factor = learning_rate / state["schedule"]["base_lrs"][0]
    for group in state["param_groups"]:
        group |= {"lr": group["lr"] * factor, "initial_lr": group["initial_lr"] * factor}
    schedule = state["schedule"]
    schedule |= {name: [rate * factor for rate in schedule[name]] for name in ("base_lrs", "_last_lr")}
    step = json.loads((source / TRAINER_STATE).read_text())["global_step"]
    discard_all(root)
    with written_whole(root / f"step-{step:08d}") as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        (scratch / STATE).write_text(json.dumps({**state, "config": config_digest}, indent=2))
    return root / f"step-{step:08d}"


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint into the model."""
    put_tensors(model, load_file(weights_file(folder)))


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Optimiser moments and schedule back into a trainer that has just made its own."""
    state = json.loads((folder / STATE).read_text())
    tensors = load_file(folder / OPTIMIZER)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    trainer.lr_scheduler.load_state_dict(state["schedule"])


def load_scaler(trainer: Any, folder: Path) -> None:
    """The loss scale of fp16, where the run has one."""
    state = json.loads((folder / STATE).read_text())["scaler"]
    if state is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state)


def load_random_state(folder: Path, rank: int) -> None:
    """Random state of this rank, as it was when the checkpoint was written."""
    states = load_file(folder / RANDOM)
    name = f"torch.{rank}"
    torch.random.set_rng_state(states[name])
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(states[f"cuda.{rank}"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    words = states["numpy"]
    np.random.set_state(("MT19937", words[:-1].numpy().astype(np.uint32), int(words[-1]), 0, 0.0))


def gather_random_state(trainer: Any) -> dict[str, Tensor]:
    """The random state of every rank; all ranks must call it."""
    own = {"torch": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.random.get_rng_state()
    world = trainer.args.world_size
    states: dict[str, Tensor] = {}
    for kind, state in own.items():
        rows = [state]
        if world > 1:
            gathered = trainer.accelerator.gather(state.to(trainer.args.device)[None])
            rows = list(gathered.cpu())
        states |= {f"{kind}.{rank}": row.contiguous().clone() for rank, row in enumerate(rows)}
    states["python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    _, words, position, *_ = np.random.get_state()
    states["numpy"] = torch.tensor([*np.asarray(words).tolist(), int(position)], dtype=torch.int64)
    return states


def _save_optimizer(trainer: Any, folder: Path, config_digest: str) -> None:
    optimizer = trainer.optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, moments in optimizer["state"].items()
        for key, value in moments.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    schedule = {k: v for k, v in trainer.lr_scheduler.state_dict().items() if _plain(v)}
    state = {
        "config": config_digest,
        "param_groups": optimizer["param_groups"],
        "schedule": schedule,
        "best_loss": None if trainer.best is None else trainer.best.loss,
        "best_step": None if trainer.best is None else trainer.best.step,
        "health": trainer.watch.state(),
        "scaler": None if trainer.accelerator.scaler is None else trainer.accelerator.scaler.state_dict(),
    }
    (folder / STATE).write_text(json.dumps(state, indent=2))


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
