"""The same training under Ray Train: one worker or many, progress to the command.

Several runs (SFT beside DPO, say) go one after the other through one group of workers, so that starting
processes and importing torch is paid once. Workers report through a mailbox, a small actor that the
command empties; a health gate that closes is carried back as a value, since raising it in a worker would
make Ray try again what cannot succeed. A worker that dies is replaced, and its runs go on from the
checkpoints in their folders, which every node of the cluster must see.

Rows come from Ray Data where they are many. Workers read by themselves what fits one block: the actors
that Ray Data starts around such data take longer than the reading.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError, RayloopError, UnavailableError
from train.config import TrainConfig
from train.imports import import_trainers
from train.mailbox import Event, Mailbox, WorkerReporter, emptied_regularly

if TYPE_CHECKING:
    from train.run import Reporter

log = logging.getLogger(__name__)

READ_CPUS = 0.5  # logical CPUs of a read task: never so many that reading waits for training
BYTES_PER_BLOCK = 64 << 20


def run_on_ray(
    configs: Sequence[TrainConfig], *, workers: int, max_failures: int, on_event: Callable[[Event], None]
) -> None:
    """Train all runs, in order, in one group of workers; needs a Ray session.

    What happens is told through `on_event`, in this thread's process, from another thread.

    Raises:
        InputError: a GPU was asked for and the cluster has too few.
        UnavailableError: the workers died more often than `max_failures`.
        RayloopError: what `on_event` raised; it ends the workers.
    """
    import ray

    use_gpu = wants_gpu(configs, workers, ray.cluster_resources())
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    _wake_coordinator()  # these two start while this process imports torch
    import ray.train

    from train.worker_group import WorkerGroupTrainer, configure

    configure(nodes=sum(node["Alive"] for node in ray.nodes()))
    datasets = streamed_rows(configs)
    trainer = WorkerGroupTrainer(
        train_in_worker,
        train_loop_config={
            "configs": list(configs),
            "mailbox": mailbox,
            "streamed": frozenset(datasets),
            "gpus": workers if use_gpu else 0,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name=configs[0].out.name,
            storage_path=str(configs[0].out.parent / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    with emptied_regularly(mailbox, on_event, trainer.stop):
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise UnavailableError(f"training workers failed: {_first_line(error)}") from error


def _wake_coordinator() -> None:
    """Start the actor that Ray Train asks for resources, where the cluster has none yet.

    Ray Train would start it itself, and wait for it, before it starts a worker.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    get_or_create_autoscaling_coordinator()


def wants_gpu(configs: Sequence[TrainConfig], workers: int, resources: Mapping[str, float]) -> bool:
    """True when the runs are to use the cluster's GPUs.

    Raises:
        InputError: they must, and there are too few.
    """
    gpus = resources.get("GPU", 0)
    device = configs[0].device
    if device == "cuda" and gpus < workers:
        raise InputError(
            "training.device",
            "cuda",
            f"needs {workers} GPU(s), the cluster has {gpus:g}",
            "add GPU nodes or use `--device cpu`",
        )
    return device != "cpu" and gpus >= workers


def streamed_rows(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The training rows of every kind that fills more than one block, as Ray datasets."""
    kinds = {config.kind: config for config in configs}
    found = {kind: _training_rows(config) for kind, config in kinds.items()}
    return {kind: dataset for kind, dataset in found.items() if dataset is not None}


def _training_rows(config: TrainConfig) -> Any:
    """A Ray dataset, or `None` for what fits one block."""
    from data.manifest import load_manifest

    prefix = f"{config.kind}/train/"
    shards = [shard for shard in load_manifest(config.dataset).shards if shard.path.startswith(prefix) and shard.rows]
    files = [str(config.dataset / shard.path) for shard in shards]
    blocks = sum(Path(file).stat().st_size for file in files) // BYTES_PER_BLOCK
    if not blocks:
        return None
    import ray.data

    return ray.data.read_parquet(files, override_num_blocks=blocks, num_cpus=READ_CPUS)


def train_in_worker(loop: dict[str, Any]) -> None:
    """What every worker runs."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    for number, config in enumerate(loop["configs"]):
        reporter = WorkerReporter(number, loop["mailbox"], rank)
        reporter.tell("begin", values={"pid": os.getpid(), "gpus": loop["gpus"]})
        try:
            result = _train_one(config, reporter, streamed=config.kind in loop["streamed"])
        except RayloopError as error:
            reporter.tell("fail", error=error)
            continue
        reporter.tell("end", result=result)


def _train_one(config: TrainConfig, reporter: "Reporter", *, streamed: bool = False) -> dict[str, Any]:
    """One run; what an earlier life of this process finished or began is not done again."""
    import_trainers()
    from train.agree import on_first
    from train.run import train

    done, resume_from = on_first(partial(_where_it_is, config))
    if done is not None:
        return done
    data = _streamed(config) if streamed else None
    return train(config, data, reporter=reporter, resume_from=resume_from).as_json()


def _where_it_is(config: TrainConfig) -> tuple[dict[str, Any] | None, Path | None]:
    """The result of a run that has ended well, or the checkpoint from which it goes on."""
    from train import checkpoint
    from train.run import finished_result

    checkpoints = config.out / "checkpoints"
    done = finished_result(config)
    if done is not None:
        checkpoint.discard_all(checkpoints)  # it may have ended between its result and this
        return done, None
    return None, checkpoint.last_checkpoint(checkpoints)


def _streamed(config: TrainConfig) -> Any:
    """The data with its training rows from Ray Data. Every worker gets all rows: accelerate splits each batch among
    the workers, so the batches, and with them the result, do not depend on which rows Ray Data sent where."""
    import pyarrow as pa
    import ray.train

    from train.examples import TrainData, in_order, read_split

    iterator = ray.train.get_dataset_shard(config.kind)
    blocks = list(iterator.iter_batches(batch_size=None, batch_format="pyarrow"))
    liked = read_split(config.dataset, "sft", "train") if config.kind == "preference" else None
    return TrainData(in_order(pa.concat_tables(blocks)), read_split(config.dataset, config.kind, "validation"), liked)


def run_here(configs: Sequence[TrainConfig], on_event: Callable[[Event], None]) -> None:
    """The same in this process, without Ray."""
    for number, config in enumerate(configs):
        reporter = _Local(number, on_event)
        on_event(Event(number, "begin", values={"gpus": _gpus_here(config)}))
        try:
            result = _train_one(config, reporter)
        except RayloopError as error:
            on_event(Event(number, "fail", error=error))
            continue
        on_event(Event(number, "end", result=result))


def _gpus_here(config: TrainConfig) -> int:
    import torch

    return int(config.device != "cpu" and torch.cuda.is_available())


@dataclass(frozen=True)
class _Local:
    run: int
    on_event: Callable[[Event], None]

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        self.on_event(Event(self.run, "progress", step=step, steps=steps, values=values))

    def checkpoint(self, folder: Path, step: int) -> None:
        self.on_event(Event(self.run, "checkpoint", step=step))


def _first_line(error: Exception) -> str:
    """The cause at the bottom of Ray's layers, on one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
