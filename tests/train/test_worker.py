"""The plain function under Ray Train gives what it gives alone, also when a worker is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors.torch import load_file

from cluster.errors import HealthGateError, InputError
from cluster.settings.training import LoraSettings
from tests.toys import toy_feedback, write_dataset
from tests.train.test_run import UNLOOKED
from train.config import TrainConfig
from train.mailbox import Event
from train.run import build_trainer, prepare, train
from train.trainers import DpoTrainer
from train.worker import run_here, run_on_ray, streamed_rows, wants_gpu

pytestmark = [pytest.mark.slow]


class Heard:
    """Keeps what happened."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def losses(self, run: int) -> list[float]:
        """Training loss at each step of a run."""
        said = [event.values or {} for event in self.events if event.run == run and event.kind == "progress"]
        return [values["loss"] for values in said if "loss" in values]

    def results(self) -> list[dict[str, Any]]:
        return [dict(event.result) for event in self.events if event.result is not None]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_runs_on_ray_equal_runs_here_and_survive_a_killed_worker(
    config_of: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """SFT then DPO in one group of workers; the worker is killed in the middle of the second."""
    shape: dict[str, Any] = {"save_steps": 2, **UNLOOKED}
    epochs = {"sft": 1, "dpo": 5}  # the second is still going on when the kill arrives
    here = [
        train(config_of(m, **shape, epochs=count, out=tmp_path / f"here-{m}")).adapter_sha256
        for m, count in epochs.items()
    ]
    heard, killed = Heard(), []

    def kill_once(event: Event) -> None:  # events come in batches: a second checkpoint may be told of the dead
        heard(event)
        if event.kind == "checkpoint" and event.run == 1 and not killed:
            begun = next(e for e in heard.events if e.kind == "begin" and e.run == 1)
            assert begun.values is not None
            killed.append(int(begun.values["pid"]))
            os.kill(killed[0], signal.SIGKILL)

    configs = [config_of(m, **shape, epochs=count, out=tmp_path / f"ray-{m}") for m, count in epochs.items()]
    run_on_ray(configs, workers=1, max_failures=2, on_event=kill_once)
    results = {result["method"]: result["adapter_sha256"] for result in heard.results()}
    assert [results["sft"], results["dpo"]] == here
    assert len([e for e in heard.events if e.kind == "begin" and e.run == 1]) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_two_workers_learn_what_one_learns_from_the_same_global_batch(
    config_of: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every step is full and nothing is dropped out: workers draw masks each for itself.

    The two get their rows from Ray Data, the one reads them itself.
    """
    monkeypatch.setattr("train.worker.BYTES_PER_BLOCK", 2048)
    folder = write_dataset(tmp_path / "feedback", toy_feedback(80))  # three full steps of 20 an epoch
    shape: dict[str, Any] = {
        "dataset": folder,
        "precision": "fp32",
        "lora": LoraSettings(dropout=0.0),
        **UNLOOKED,
    }
    methods = ("sft", "dpo", "kto")
    alone, together = Heard(), Heard()
    run_here([config_of(m, **shape, batch_size=20, out=tmp_path / f"one-{m}") for m in methods], alone)
    halves = [config_of(m, **shape, batch_size=10, out=tmp_path / f"two-{m}") for m in methods]
    assert set(streamed_rows(halves)) == {"sft", "preference", "unpaired"}
    run_on_ray(halves, workers=2, max_failures=0, on_event=together)
    for run, method in enumerate(methods):
        assert together.losses(run) == pytest.approx(alone.losses(run), rel=1e-4), method
        one, two = (load_file(tmp_path / f"{n}-{method}" / "adapter" / ADAPTER_WEIGHTS) for n in ("one", "two"))
        furthest = max(float((one[name] - two[name]).abs().max()) for name in one)
        assert furthest < 0.01 * max(float(one[name].abs().max()) for name in one if "lora_B" in name), method


class OneOf(DpoTrainer):
    """One of several workers, up to where they tell each other what each has computed."""

    def __init__(self, trainer: Any, place: int, count: int) -> None:
        self.__dict__ |= trainer.__dict__
        real = trainer.accelerator
        shared = {"device": real.device, "unwrap_model": real.unwrap_model, "autocast": real.autocast}
        self.accelerator = SimpleNamespace(process_index=place, num_processes=count, **shared)
        self.passes = 0

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.passes += 1
        return super().compute_ref_log_probs(model, inputs)


def test_workers_share_out_the_reference_pass(
    config_of: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(prepare(config_of("dpo", reference_cache=None)), None)
    rows = trainer.train_dataset.remove_columns(list(trainer.reference_columns))
    alone, first, second = OneOf(trainer, 0, 1), OneOf(trainer, 0, 2), OneOf(trainer, 1, 2)
    expected = alone._reference_logps(rows, 4)
    assert expected["ref_chosen_logps"] == pytest.approx(list(trainer.train_dataset["ref_chosen_logps"]), abs=1e-3)
    told: list[Any] = []
    monkeypatch.setattr("train.trainers.gather_object", lambda own: told.append(own[0]) or own)
    first._reference_logps(rows, 4)
    monkeypatch.setattr("train.trainers.gather_object", lambda own: told + own)
    assert second._reference_logps(rows, 4) == expected
    assert first.passes + second.passes == alone.passes == -(-len(rows) // 4)
    assert abs(first.passes - second.passes) <= 1


def test_a_refusal_in_the_reference_pass_reaches_every_worker(
    config_of: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(prepare(config_of("dpo", reference_cache=None)), None)
    rows = trainer.train_dataset.remove_columns(list(trainer.reference_columns))
    refusal = InputError("training.dpo.shared_prompt", True, "changes this model", "set it to false")
    monkeypatch.setattr("train.trainers.gather_object", lambda own: [*own, refusal])
    with pytest.raises(InputError, match="changes this model"):
        OneOf(trainer, 0, 2)._reference_logps(rows, 4)


def test_a_closed_gate_ends_its_run_and_not_the_next(config_of: Callable[..., TrainConfig], tmp_path: Path) -> None:
    rows = toy_feedback(40)
    rows["preference"] = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows["preference"]]
    folder = write_dataset(tmp_path / "swapped", rows)
    heard = Heard()
    configs = [config_of(m, max_steps=1, dataset=folder, out=tmp_path / m) for m in ("dpo", "sft")]
    run_here(configs, heard)
    assert isinstance(next(e.error for e in heard.events if e.kind == "fail"), HealthGateError)
    assert [result["method"] for result in heard.results()] == ["sft"]


def test_cluster_without_gpu_refuses_cuda(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(InputError, match=r"needs 2 GPU\(s\), the cluster has 1"):
        wants_gpu([config_of("sft", device="cuda")], 2, {"GPU": 1.0})
    assert wants_gpu([config_of("sft")], 1, {"GPU": 1.0})
    assert not wants_gpu([config_of("sft")], 1, {"CPU": 4.0})
