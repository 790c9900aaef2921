"""Gates that stop a training that is going wrong, with the reason, before anybody evaluates its result.

Each gate is a pure function on a few numbers; `HealthWatch` feeds them from the trainer's log. They are
meant to be quiet on a healthy run: a false alarm costs a night's training.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.errors import HealthGateError
from cluster.settings.training import HealthSettings
from train.examples import Encoded

log = logging.getLogger(__name__)


def check_truncation(split: str, encoded: Encoded, settings: HealthSettings, max_length: int) -> None:
    """Raises HealthGateError when too many examples are cut or lost."""
    total = len(encoded.rows) + encoded.dropped
    lost = max(encoded.truncated, encoded.dropped)
    if total and lost / total > settings.max_truncated_share:
        raise HealthGateError(
            f"{lost} of {total} {split} examples do not fit max_length={max_length} or lose their answer; "
            "raise `training.max_length`"
        )


def swapped_share(pairs: pa.Table, liked: pa.Table | None) -> tuple[float, int]:
    """Share of checkable pairs whose rejected answer is the better one, and how many are checkable.

    A pair is checkable when the same prompt has a liked answer (in the SFT rows made from the same
    feedback) that is one of its two answers, or when its margin is not zero.
    """
    best: dict[str, set[str]] = {}
    for row in liked.to_pylist() if liked is not None and liked.num_rows else []:
        messages = json.loads(row["messages"])
        best.setdefault(_key(messages[:-1]), set()).add(_key(messages[-1:]))
    swapped = checked = 0
    for row in pairs.to_pylist():
        answers = best.get(_key(json.loads(row["prompt"])), set())
        chosen, rejected = _key(json.loads(row["chosen"])), _key(json.loads(row["rejected"]))
        if (chosen in answers) != (rejected in answers):
            checked += 1
            swapped += rejected in answers
        elif row.get("margin"):
            checked += 1
            swapped += row["margin"] < 0
    return (swapped / checked if checked else 0.0), checked


def check_swapped(pairs: pa.Table, liked: pa.Table | None, settings: HealthSettings) -> None:
    """Raises HealthGateError when the pairs teach the opposite of what people liked."""
    share, checked = swapped_share(pairs, liked)
    if checked >= settings.min_checked_pairs and share > settings.max_swapped_share:
        raise HealthGateError(
            f"pairs are swapped: in {share:.0%} of {checked} that can be checked the rejected answer is the one "
            "people liked; look at how the pairs were made"
        )


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([[m.get("role"), m.get("content"), m.get("tool_calls")] for m in messages], sort_keys=True)


def warnings_for(method: str, sft_weight: float, pairs: pa.Table) -> list[str]:
    """What is fragile about this run, in words, for the log and the report."""
    found = []
    if method == "dpo" and sft_weight == 0:
        found.append("DPO without the SFT term is fragile: valid answers may be unlearned; set training.dpo.sft_weight")
    if method == "dpo" and "origin" in pairs.column_names:
        origins = set(pairs.column("origin").to_pylist())
        if origins == {"correction"}:
            found.append("DPO from corrections alone is fragile: it has never seen a liked answer; collect more thumbs")
    return found


SEEN = ("answer_tokens", "history", "start_length_ratio", "groups")
"""What a watch knows of the run so far."""


@dataclass
class HealthWatch:
    """Follows one run's log and raises when a gate closes."""

    settings: HealthSettings
    beta: float | None = None
    answer_tokens: float | None = 1.0
    """Mean length of the chosen or liked answers; `None` where there are none: then of the model's first ones."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Rewards of the chosen answers and margins: of the first steps and of the last."""
    start_length_ratio: float | None = None
    groups: list[dict[str, float]] = field(default_factory=list)
    """GRPO: share of groups without spread, mean reward and share of abstentions, of the last steps."""

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain values; `restore` takes it up again."""
        return {name: getattr(self, name) for name in SEEN}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where the watch of a killed run was."""
        for name in SEEN:
            setattr(self, name, state[name])

    def observe(self, step: int, values: Mapping[str, Any]) -> None:
        """One entry of the trainer's log.

        Raises:
            HealthGateError: a loss that is not a number, a collapse of the chosen answers, or rewards that
                teach nothing.
        """
        for name in ("loss", "grad_norm", "eval_loss"):
            value = values.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                raise HealthGateError(f"{name} is {value} at step {step}; lower the learning rate or look at the data")
        if "rewards/chosen" in values and "rewards/margins" in values:
            self.history.append({"chosen": values["rewards/chosen"], "margin": values["rewards/margins"]})
            del self.history[self.settings.window_steps : -self.settings.window_steps]
            self._check_collapse(step)
        if "frac_reward_zero_std" in values:
            self._observe_groups(step, values)

    def _observe_groups(self, step: int, values: Mapping[str, Any]) -> None:
        reward = values.get("reward")
        row = {"flat": values["frac_reward_zero_std"], "abstained": values.get("abstained", 0.0)}
        self.groups.append({**row, "reward": 0.0 if reward is None else reward})
        window = self.settings.window_steps
        del self.groups[: -2 * window]
        recent, long = self.groups[-window:], self.groups
        abstained = _mean(recent, "abstained")
        if len(recent) == window and abstained > self.settings.max_abstained_share:
            raise HealthGateError(
                f"the grader abstained on {abstained:.0%} of the answers up to step {step}; give it the reference or "
                "the fields it compares with"
            )
        flat, reward = _mean(long, "flat"), _mean(recent, "reward")
        gone = flat >= self.settings.max_zero_spread_share and reward < self.settings.solved_reward
        if len(long) == 2 * window and gone:
            raise HealthGateError(
                f"no advantage left: in {flat:.0%} of the groups of the last {2 * window} steps, up to step {step}, "
                f"all answers earned the same (mean reward {reward:.2f}); use a grader with partial credit, a higher "
                "temperature or other prompts"
            )

    def _check_collapse(self, step: int) -> None:
        window = self.settings.window_steps
        if self.beta is None or not self.answer_tokens or len(self.history) < 2 * window:
            return
        recent, first = self.history[-window:], self.history[:window]
        nats = -_mean(recent, "chosen") / self.beta / self.answer_tokens
        grew = _mean(recent, "margin") > _mean(first, "margin")
        if grew and nats > self.settings.collapse_nats_per_token:
            raise HealthGateError(
                f"the chosen answers lost {nats:.2f} nats a token by step {step} while the margin grew: the model is "
                "unlearning both; add the SFT term, raise beta or lower the learning rate"
            )

    def observe_length(self, step: int, answer_tokens: float) -> None:
        """Mean length of greedy answers beside that of the reference answers.

        Raises:
            HealthGateError: answers drifted away from the reference length since the start.
        """
        if self.answer_tokens is None:
            self.answer_tokens = max(answer_tokens, 1.0)
        ratio = answer_tokens / max(self.answer_tokens, 1e-9)
        if self.start_length_ratio is None:
            self.start_length_ratio = ratio
            return
        limit, distance = math.log(self.settings.max_length_ratio), abs(math.log(max(ratio, 1e-9)))
        if distance > limit and distance > abs(math.log(max(self.start_length_ratio, 1e-9))) + limit / 2:
            raise HealthGateError(
                f"answers drifted to {ratio:.1f} times the reference length by step {step} "
                f"({self.start_length_ratio:.1f} at the start); lower the learning rate or balance the lengths"
            )


def check_changed(shift_nats: float | None, weights_equal: bool, settings: HealthSettings) -> list[str]:
    """The no-op detector; returns a warning for an adapter that hardly does anything.

    Raises:
        HealthGateError: the adapter is what it was before training.
    """
    if weights_equal:
        raise HealthGateError(
            "training changed nothing: the adapter equals its start; raise the learning rate or steps"
        )
    if shift_nats is not None and shift_nats < settings.min_canary_shift_nats:
        return [
            f"the adapter hardly does anything: held-out answers moved by {shift_nats:.1e} nats a token; "
            "raise the learning rate"
        ]
    return []


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
