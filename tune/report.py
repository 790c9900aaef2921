"""The result of a sweep: trials, the Pareto front of win rate against KL, the chosen configuration."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it."""

    number: int
    config: dict[str, Any]
    win_rate: float | None
    """On the validation split, against the model the training started from; ties count half."""
    kl: float | None
    """Estimated KL divergence from that model, in nats a generated token."""
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
        return self.status == "completed" and self.win_rate is not None and self.kl is not None


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in both win rate and KL, by rising KL."""
    front: list[Trial] = []
    best = float("-inf")
    for trial in sorted((t for t in trials if t.measured), key=lambda t: (t.kl, -(t.win_rate or 0.0), t.number)):
        if trial.win_rate is not None and trial.win_rate > best:
            front.append(trial)
            best = trial.win_rate
    return front


def choose(trials: Sequence[Trial], kl_limit: float) -> Trial | None:
    """The best win rate among the trials that keep the limit, ties to the lower KL; `None` if none does."""
    return next((t for t in reversed(pareto_front(trials)) if t.kl is not None and t.kl <= kl_limit), None)


def print_sweep(trials: Sequence[Trial], chosen: Trial | None, kl_limit: float, console: Console) -> None:
    """All trials as a table, the Pareto front marked `*`, the chosen one `→`."""
    front = pareto_front(trials)
    names = sorted({name for trial in trials for name in trial.config})
    table = Table("", "trial", *names, "win rate", "KL (nats/token)", "reward", "status", "s")
    for trial in trials:
        mark = "→" if trial == chosen else "*" if trial in front else ""
        values = [_shown(trial.config.get(name)) for name in names]
        measured = [_shown(value) for value in (trial.win_rate, trial.kl, trial.reward)]
        status = (
            trial.status
            if trial.progress >= 1 or trial.status == "failed"
            else f"{trial.status} at {trial.progress:.0%}"
        )
        table.add_row(mark, str(trial.number), *values, *measured, status, f"{trial.seconds:.0f}")
    console.print(table)
    if chosen is None:
        console.print(
            f"no trial keeps KL <= {kl_limit:g} nats a token; raise sweep.kl_limit or lower the learning rate"
        )


def markdown(trials: Sequence[Trial], chosen: Trial | None) -> str:
    """The Pareto table as Markdown."""
    front = pareto_front(trials)
    lines = ["| | trial | configuration | win rate | KL (nats/token) | status |", "|---|---|---|---|---|---|"]
    for trial in trials:
        mark = "chosen" if trial == chosen else "Pareto" if trial in front else ""
        config = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(trial.config.items()))
        numbers = f"{_shown(trial.win_rate)} | {_shown(trial.kl)}"
        lines.append(f"| {mark} | {trial.number} | {config} | {numbers} | {trial.status} |")
    return "\n".join(lines) + "\n"


def plot(trials: Sequence[Trial], chosen: Trial | None, kl_limit: float) -> bytes:
    """PNG: win rate against KL, the front as a line, the limit, the chosen point marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = [t for t in trials if t.measured]
    front = pareto_front(trials)
    axes.scatter(*_coordinates(points), label="trials")
    axes.step(*_coordinates(front), where="post", label="Pareto front")
    axes.axvline(kl_limit, linestyle=":", color="grey", label=f"limit {kl_limit:g}")
    axes.axhline(0.5, linestyle=":", color="lightgrey")
    if chosen:
        axes.scatter(*_coordinates([chosen]), marker="*", s=260, color="tab:red", label="chosen")
    axes.set(xlabel="KL from the start (nats a token)", ylabel="win rate on the validation split")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _coordinates(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    measured = [(t.kl, t.win_rate) for t in trials if t.kl is not None and t.win_rate is not None]
    return [kl for kl, _ in measured], [rate for _, rate in measured]


def to_json(trial: Trial) -> dict[str, Any]:
    """Plain values for JSON."""
    return asdict(trial)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
