"""The Pareto front and the choice under the constraint."""

import io
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tune.objective import axes_of
from tune.report import Trial, choose, markdown, pareto_front, plot, print_sweep

AXES = axes_of("dpo", 0.1)


def trial(number: int, win_rate: float | None, kl: float | None, status: str = "completed") -> Trial:
    return Trial(number, {"learning_rate": 1e-4, "beta": 0.1}, win_rate, kl, status=status, progress=1.0)


TRIALS = [
    trial(0, 0.60, 0.02),
    trial(1, 0.70, 0.08),
    trial(2, 0.65, 0.09),  # beaten by 1 in both
    trial(3, 0.90, 0.40),  # best, but beyond the limit
    trial(4, 0.95, 0.01, "stopped"),  # never measured at its end
    trial(5, None, None, "failed"),
]


def test_pareto_front_and_choice() -> None:
    assert [t.number for t in pareto_front(TRIALS)] == [0, 1, 3]
    assert choose(TRIALS, 0.1) == TRIALS[1]
    assert choose(TRIALS, 1.0) == TRIALS[3]
    assert choose(TRIALS, 0.01) is None
    assert choose([], 0.1) is None


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20)


@given(points)
def test_nothing_beats_a_point_of_the_front(found: list[tuple[float, float]]) -> None:
    trials = [trial(i, rate, kl) for i, (rate, kl) in enumerate(found)]
    front = pareto_front(trials)
    assert bool(front) == bool(trials)
    for best in front:
        for other in trials:
            assert (
                other.value is not None and other.cost is not None and best.value is not None and best.cost is not None
            )
            better = other.value >= best.value and other.cost <= best.cost
            assert not (better and (other.value > best.value or other.cost < best.cost))


def test_report_shows_the_choice_and_every_trial() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    print_sweep(TRIALS, TRIALS[1], AXES, console)
    print_sweep(TRIALS, None, replace(AXES, limit=0.001), console)
    text = console.export_text()
    assert "→" in text and "no trial keeps KL <= 0.001" in text and "stopped" in text
    table = markdown(TRIALS, TRIALS[1], AXES)
    assert table.count("\n") == 8 and "| chosen | 1 |" in table and "| Pareto | 3 |" in table
    assert plot(TRIALS, TRIALS[1], AXES).startswith(b"\x89PNG") and plot([], None, axes_of("reward", 0.1)).startswith(
        b"\x89PNG"
    )
