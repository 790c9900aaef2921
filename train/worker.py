"""The same training under Ray Train: one worker or many, data from Ray Data, progress to the command.

Several runs (SFT beside DPO, say) go one after the other through one group of workers, so that starting
processes and importing torch is paid once. Workers report through a mailbox, a small actor that the
command empties; a health gate that closes is carried back as a value, since raising it in a worker would
make Ray try again what cannot succeed. A worker that dies is replaced, and its runs go on from the
checkpoints in their folders, which every node of the cluster must see.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InputError, RayloopError, UnavailableError
from train.config import TrainConfig

log = logging.getLogger(__name__)

POLL_S = 0.25  # how often the command looks into the mailbox
READ_CPUS = 0.5  # logical CPUs of a read task: never so many that reading waits for training
BYTES_PER_BLOCK = 64 << 20


@dataclass(frozen=True)
class Event:
    """Something a worker has to say about one of the runs."""

    run: int
    """Place of the run in the list that was started."""
    kind: str
    """`begin`, `progress`, `checkpoint`, `end` or `fail`."""
    step: int = 0
    steps: int = 0
    values: Mapping[str, float] | None = None
    result: Mapping[str, Any] | None = None
    error: RayloopError | None = None


class Mailbox:
    """The actor between workers and command."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def put(self, events: Sequence[Event]) -> None:
        """Leave events."""
        self.events.extend(events)

    def take(self) -> list[Event]:
        """All events since the last call."""
        taken = list(self.events)
        self.events.clear()
        return taken


def run_on_ray(
    configs: Sequence[TrainConfig], *, workers: int, max_failures: int, on_event: Callable[[Event], None]
) -> None:
    """Train all runs, in order, in one group of workers; needs a Ray session.

    What happens is told through `on_event`, in this thread's process, from another thread.

    Raises:
        InputError: a GPU was asked for and the cluster has too few.
        UnavailableError: the workers died more often than `max_failures`.
    """
    import ray
    import ray.train
    import ray.train.torch

    use_gpu = wants_gpu(configs, workers, ray.cluster_resources())
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = ray.train.torch.TorchTrainer(
        train_in_worker,
        train_loop_config={"configs": list(configs), "mailbox": mailbox},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        datasets=_datasets(configs),
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name=configs[0].out.name,
            storage_path=str(configs[0].out.parent / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    with _empty_regularly(mailbox, on_event):
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise UnavailableError(f"training workers failed: {_first_line(error)}") from error


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


def _datasets(configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """The training rows of every kind that is needed, as Ray datasets."""
    datasets: dict[str, Any] = {}
    for config in configs:
        if config.kind not in datasets:
            datasets[config.kind] = _training_rows(config)
    return datasets


def _training_rows(config: TrainConfig) -> Any:
    """A Ray dataset; what fits one block is read here, for the processes that read cost more than such data."""
    import ray.data

    from data.manifest import load_manifest
    from train.examples import read_split

    prefix = f"{config.kind}/train/"
    shards = [shard for shard in load_manifest(config.dataset).shards if shard.path.startswith(prefix) and shard.rows]
    files = [str(config.dataset / shard.path) for shard in shards]
    blocks = sum(Path(file).stat().st_size for file in files) // BYTES_PER_BLOCK
    if not blocks:
        return ray.data.from_arrow(read_split(config.dataset, config.kind, "train"))
    return ray.data.read_parquet(files, override_num_blocks=blocks, num_cpus=READ_CPUS)


def train_in_worker(loop: dict[str, Any]) -> None:
    """What every worker runs."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    for number, config in enumerate(loop["configs"]):
        reporter = WorkerReporter(number, loop["mailbox"], rank)
        reporter.tell("begin", values={"pid": os.getpid()})
        try:
            result = _train_one(config, reporter)
        except RayloopError as error:
            reporter.tell("fail", error=error)
            continue
        reporter.tell("end", result=result)
        ray.train.report({f"{config.method}/{name}": value for name, value in result["metrics"].items()})


def _train_one(config: TrainConfig, reporter: "WorkerReporter") -> dict[str, Any]:
    """One run; what an earlier life of this worker finished or began is not done again."""
    from train import checkpoint
    from train.run import finished_result, train

    done = finished_result(config)
    if done is not None:
        return done
    resume_from = checkpoint.last_checkpoint(config.out / "checkpoints")
    return train(config, _shard(config), reporter=reporter, resume_from=resume_from).as_json()


def _shard(config: TrainConfig) -> Any:
    """This worker's data. Every worker gets all rows: accelerate splits each batch among the workers, so
    the batches, and with them the result, do not depend on which rows Ray Data sent where."""
    import pyarrow as pa
    import ray.train

    from train.examples import TrainData, in_order, read_split

    iterator = ray.train.get_dataset_shard(config.kind)
    blocks = list(iterator.iter_batches(batch_size=None, batch_format="pyarrow"))
    liked = read_split(config.dataset, "sft", "train") if config.kind == "preference" else None
    return TrainData(in_order(pa.concat_tables(blocks)), read_split(config.dataset, config.kind, "validation"), liked)


class WorkerReporter:
    """Sends what a worker has to say to the mailbox; only rank 0 speaks.

    Steps are told together, as often as the command looks: a message costs as much as a short step.
    """

    def __init__(self, run: int, mailbox: Any, rank: int) -> None:
        self.run, self.mailbox, self.rank = run, mailbox, rank
        self.unsent: list[Event] = []
        self.sent_at = time.monotonic()

    def tell(self, kind: str, **more: Any) -> None:
        """One event, sent at once with those that wait."""
        if self.rank == 0:
            self.unsent.append(Event(self.run, kind, **more))
            self._send()

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """What one step measured."""
        if self.rank == 0:
            self.unsent.append(Event(self.run, "progress", step, steps, dict(values)))
            if time.monotonic() - self.sent_at >= POLL_S:
                self._send()

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint was written."""
        self.tell("checkpoint", step=step)

    def _send(self) -> None:
        self.mailbox.put.remote(self.unsent)
        self.unsent, self.sent_at = [], time.monotonic()


@contextlib.contextmanager
def _empty_regularly(mailbox: Any, on_event: Callable[[Event], None]) -> Any:
    """Hand over events while the block runs, and the last of them when it ends."""
    import ray

    ended = threading.Event()
    failures: list[BaseException] = []

    def empty() -> None:
        for event in ray.get(mailbox.take.remote()):
            on_event(event)

    def work() -> None:
        try:
            while not ended.wait(POLL_S):
                empty()
        except BaseException as error:  # shown by the block's end, not lost in a thread
            failures.append(error)

    thread = threading.Thread(target=work, name="mailbox", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            empty()
        ray.kill(mailbox)
    if failures:
        raise failures[0]


def run_here(configs: Sequence[TrainConfig], on_event: Callable[[Event], None]) -> None:
    """The same in this process, without Ray."""
    for number, config in enumerate(configs):
        reporter = _Local(number, on_event)
        on_event(Event(number, "begin"))
        try:
            result = _resume_here(config, reporter)
        except RayloopError as error:
            on_event(Event(number, "fail", error=error))
            continue
        on_event(Event(number, "end", result=result))


def _resume_here(config: TrainConfig, reporter: "_Local") -> dict[str, Any]:
    from train import checkpoint
    from train.run import finished_result, train

    done = finished_result(config)
    if done is not None:
        return done
    resume_from = checkpoint.last_checkpoint(config.out / "checkpoints")
    return train(config, reporter=reporter, resume_from=resume_from).as_json()


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
