"""What happens between the steps of a trainer: validation, checkpoints, the best adapter, health, progress."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from train.agree import on_first
from train.health import HealthWatch
from train.report import greedy_lengths
from train.weights import trained_tensors

LENGTH_HEADROOM = 8  # tokens beyond the longest answer that still counts as no drift


class Schedule(TrainerCallback):  # type: ignore[misc]
    """Validation, then checkpoint, at the end of every epoch and every so many steps between.

    In this order and at one place, because validation draws random numbers: a checkpoint written before
    it would not resume to the same adapter.
    """

    def __init__(self, eval_steps: int, save_steps: int, has_validation: bool) -> None:
        self.eval_steps, self.save_steps, self.has_validation = eval_steps, save_steps, has_validation
        self.steps_per_epoch = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how many steps an epoch has."""
        batches = len(kwargs["train_dataloader"])
        self.steps_per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for validation and for a checkpoint."""
        step = state.global_step
        last = step >= state.max_steps
        at_end = last or step % self.steps_per_epoch == 0
        control.should_evaluate = self.has_validation and (at_end or step % self.eval_steps == 0)
        control.should_save = not last and (at_end or step % self.save_steps == 0)
        return control


class BestKeeper(TrainerCallback):  # type: ignore[misc]
    """Keeps a copy of the weights with the lowest validation loss, or the highest validation reward."""

    def __init__(self, trainer: Any, monitored: str) -> None:
        self.trainer, self.monitored = trainer, monitored

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        """Compare and copy."""
        from train.trainers import Best

        value, best = metrics.get(self.monitored), self.trainer.best
        if value is None:  # nothing could be graded
            return
        loss = -value if self.monitored.endswith("reward") else value
        if best is None or loss < best.loss:
            self.trainer.best = Best(loss, state.global_step, trained_tensors(self.trainer.model))


class HealthCallback(TrainerCallback):  # type: ignore[misc]
    """Hands the log and the length of sampled answers to the health gates."""

    def __init__(
        self, trainer: Any, watch: HealthWatch, prompts: Sequence[list[int]], tokenizer: Any, longest: int
    ) -> None:
        self.trainer, self.watch, self.prompts, self.tokenizer = trainer, watch, prompts, tokenizer
        self.longest = longest
        """Tokens of an answer that is still read to its end where no answer says how long they are."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the length of answers before the first step; a resumed run knows it."""
        if self.watch.start_length_ratio is None:
            self._look_at_lengths(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Raise when a gate closes."""
        self.watch.observe(state.global_step, logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise when answers drift in length."""
        self._look_at_lengths(state.global_step)

    def _look_at_lengths(self, step: int) -> None:
        if not self.prompts:
            return
        expected, limit = self.watch.answer_tokens, self.longest
        if expected is not None:
            limit = round(expected * self.watch.settings.max_length_ratio * 2) + LENGTH_HEADROOM
        model = self.trainer.model
        length = on_first(lambda: greedy_lengths(model, self.tokenizer, self.prompts, limit))
        self.watch.observe_length(step, length)


class Pace:
    """How fast a run goes, from one step to the next; validation between two steps counts."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        self.last: tuple[float, float] | None = None

    def of(self, step: int, steps: int, tokens: float | None, at_s: float) -> dict[str, float]:
        """`eta_s` and, since the step before, `tokens_per_s`; `tokens` are those read so far, on every worker."""
        found: dict[str, float] = {}
        if self.first is None:  # what came before, loading or an earlier life, says nothing about the speed
            self.first = step, at_s
        elif step > self.first[0]:
            found["eta_s"] = (steps - step) * (at_s - self.first[1]) / (step - self.first[0])
        if tokens is not None:
            if self.last is not None and at_s > self.last[1]:
                found["tokens_per_s"] = (tokens - self.last[0]) / (at_s - self.last[1])
            self.last = tokens, at_s
        return found


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Passes what each step measured to a reporter."""

    def __init__(self, progress: Callable[[int, int, Mapping[str, float]], None]) -> None:
        self.progress = progress
        self.process = psutil.Process()
        self.pace = Pace()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Report one entry of the log."""
        values = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        values |= self.pace.of(state.global_step, state.max_steps, values.get("num_tokens"), time.monotonic())
        values |= self._system()
        self.progress(state.global_step, state.max_steps, values)

    def _system(self) -> dict[str, float]:
        """Memory and processor use of this worker; 100 % is one core."""
        found = {
            "system/memory_mb": self.process.memory_info().rss / 2**20,
            "system/cpu_percent": self.process.cpu_percent(),
        }
        if torch.cuda.is_available():
            found["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return found
