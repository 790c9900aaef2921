"""The result of a sweep: trials, the Pareto front of value against cost, the chosen configuration."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tune.objective import Axes


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it."""

    number: int
    config: dict[str, Any]
    value: float | None
    """On the validation split: the win rate against the model the training started from, ties counting half; for a
    reward model its accuracy."""
    cost: float | None
    """Estimated KL divergence from that model, in nats a generated token; for a reward model its calibration error."""
    reward: float | None = None
    """Mean reward of the grader."""
    progress: float = 0.0
    """Share of the training that was done; below 1 the scheduler stopped it."""
    status: str = "completed"
    """`completed`, `stopped` or `failed`."""
    adapter_dir: str | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def measured(self) -> bool:
        """Whether the training ran to its end and was measured."""
        return self.status == "completed" and self.value is not None and self.cost is not None


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in both value and cost, by rising cost."""
    front: list[Trial] = []
    best = float("-inf")
    for trial in sorted((t for t in trials if t.measured), key=lambda t: (t.cost, -(t.value or 0.0), t.number)):
        if trial.value is not None and trial.value > best:
            front.append(trial)
            best = trial.value
    return front


def choose(trials: Sequence[Trial], limit: float | None) -> Trial | None:
    """The best value among the trials whose cost keeps the limit, ties to the lower; `None` if none does."""
    keeping = (t for t in reversed(pareto_front(trials)) if t.cost is not None and (limit is None or t.cost <= limit))
    return next(keeping, None)


def print_sweep(trials: Sequence[Trial], chosen: Trial | None, axes: Axes, console: Console) -> None:
    """All trials as a table, the Pareto front marked `*`, the chosen one `→`."""
    front = pareto_front(trials)
    names = sorted({name for trial in trials for name in trial.config})
    table = Table("", "trial", *names, *axes.names, "reward", "status", "s")
    for trial in trials:
        mark = "→" if trial == chosen else "*" if trial in front else ""
        values = [_shown(trial.config.get(name)) for name in names]
        measured = [_shown(value) for value in (trial.value, trial.cost, trial.reward)]
        status = (
            trial.status
            if trial.progress >= 1 or trial.status == "failed"
            else f"{trial.status} at {trial.progress:.0%}"
        )
        table.add_row(mark, str(trial.number), *values, *measured, status, f"{trial.seconds:.0f}")
    console.print(table)
    if chosen is None and axes.limit is not None:
        console.print(
            f"no trial keeps KL <= {axes.limit:g} nats a token; raise sweep.kl_limit or lower the learning rate"
        )


def markdown(trials: Sequence[Trial], chosen: Trial | None, axes: Axes) -> str:
    """The Pareto table as Markdown."""
    front = pareto_front(trials)
    value, cost = axes.names
    lines = [f"| | trial | configuration | {value} | {cost} | status |", "|---|---|---|---|---|---|"]
    for trial in trials:
        mark = "chosen" if trial == chosen else "Pareto" if trial in front else ""
        config = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(trial.config.items()))
        numbers = f"{_shown(trial.value)} | {_shown(trial.cost)}"
        lines.append(f"| {mark} | {trial.number} | {config} | {numbers} | {trial.status} |")
    return "\n".join(lines) + "\n"


def plot(trials: Sequence[Trial], chosen: Trial | None, axes: Axes) -> bytes:
    """PNG: value against cost, the front as a line, the limit, the chosen point marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    points = [t for t in trials if t.measured]
    front = pareto_front(trials)
    panel.scatter(*_coordinates(points), label="trials")
    panel.step(*_coordinates(front), where="post", label="Pareto front")
    if axes.limit is not None:
        panel.axvline(axes.limit, linestyle=":", color="grey", label=f"limit {axes.limit:g}")
    panel.axhline(0.5, linestyle=":", color="lightgrey")
    if chosen:
        panel.scatter(*_coordinates([chosen]), marker="*", s=260, color="tab:red", label="chosen")
    value, cost = axes.names
    panel.set(xlabel=cost, ylabel=f"{value} on the validation split")
    panel.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _coordinates(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    measured = [(t.cost, t.value) for t in trials if t.cost is not None and t.value is not None]
    return [cost for cost, _ in measured], [value for _, value in measured]


def to_json(trial: Trial) -> dict[str, Any]:
    """Plain values for JSON."""
    return asdict(trial)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
