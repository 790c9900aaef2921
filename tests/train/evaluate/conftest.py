"""Evidence from hand-made versions."""

from collections.abc import Callable, Sequence

import pytest

from cluster.settings.evaluation import EvaluationSettings
from data.grading import make_grader
from tests.train.evaluate.fakes import Answerer, FakeModel
from train.evaluate.evidence import Evidence, ask
from train.evaluate.types import Case, Truth


@pytest.fixture
def make_evidence() -> Callable[..., Evidence]:
    def make(
        candidate: FakeModel | Answerer,
        champion: FakeModel | Answerer,
        truths: Sequence[Truth] = (),
        cases: dict[str, list[Case]] | None = None,
        **settings: object,
    ) -> Evidence:
        models = [
            model if isinstance(model, FakeModel) else FakeModel(name, model)
            for name, model in (("t/2", candidate), ("t/1", champion))
        ]
        every = [case for rows in (cases or {}).values() for case in rows]
        chosen = EvaluationSettings(bootstrap_samples=400, **settings)  # type: ignore[arg-type]
        mine, theirs = (ask(model, truths, every) for model in models)
        grader = make_grader(chosen.grader)
        return Evidence(chosen, list(truths), mine, theirs, grader, cases or {}, template=("same", "same"))

    return make
