"""The reward model: what it learns, what it says of itself, and its use as a grader."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from cluster.errors import InputError, UnavailableError
from cluster.settings.engines import GraderSettings
from data.grading import AtHand, make_grader
from data.grading.reward_model import HttpScorer
from data.labelling.requests import JudgedPair
from serve.grading import Grading
from tests.toys import toy_answer
from tests.train.evaluate.conftest import make_evidence as make_evidence
from train.calibration import calibrate, fit_temperature, measure_scores, reliability
from train.config import TrainConfig
from train.evaluate.calibration import calibration
from train.evaluate.evidence import Evidence
from train.evaluate.run import as_grader
from train.examples import Encoder, read_data
from train.models import load_tokenizer
from train.run import TrainResult, train
from train.scorer import LocalScorer, scoring_app

HELD_OUT = [(service, hour) for service in ("api", "mail", "search") for hour in range(0, 24, 3)]
ASKED = {"messages": [{"role": "user", "content": "service=api level=dead hour=3"}]}


@pytest.fixture(scope="module")
def trained(toy_base: Path, toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A reward model that has seen a hundred and twenty pairs often enough to know them."""
    from cluster.settings import load_settings
    from train.config import resolve_config

    folder = tmp_path_factory.mktemp("reward")
    settings, _ = load_settings(home=folder / "home")
    shape: dict[str, Any] = {"epochs": 15, "batch_size": 20, "gradient_accumulation": 1, "learning_rate": 1e-2}
    config = resolve_config(
        settings, "reward", base_model=str(toy_base), dataset=toy_dataset, out=folder / "out", threads=1, **shape
    )
    return train(config)


def test_reward_model_learns_to_tell_held_out_answers_apart(trained: TrainResult) -> None:
    assert trained.metrics["heldout/pair_accuracy"] > 0.9
    assert trained.metrics["heldout/loss"] < 0.5 * math.log(2)
    assert set(trained.metrics) >= {"heldout/pair_accuracy_on_correction", "heldout/temperature"}
    tensors = load_file(trained.adapter_dir / "adapter_model.safetensors")
    assert [name for name in tensors if "score" in name] == ["base_model.model.score.weight"]


def test_reward_model_leaves_its_calibration_beside_it(trained: TrainResult) -> None:
    report = trained.adapter_dir.parent / "report"
    document = json.loads((report / "calibration.json").read_text())
    assert sum(one["pairs"] for one in document["bins"]) == document["heldout/pairs"] == 40
    assert (report / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_local_scorer_gives_the_grader_a_reward_that_follows_the_answer(trained: TrainResult) -> None:
    scorer = LocalScorer(trained.adapter_dir)
    grader = make_grader(
        {"type": "reward_model", "adapter_sha256": trained.adapter_sha256}, at_hand=AtHand(scorer=scorer)
    )
    right = grader.grade(ASKED, {"output_text": toy_answer("api", "dead")}).reward
    wrong = grader.grade(ASKED, {"output_text": toy_answer("api", "low")}).reward
    assert right is not None and wrong is not None and 0 <= wrong < 0.5 < right <= 1
    assert grader.grade({}, {"output_text": "x"}).reward is None


def test_a_trained_reward_model_is_held_against_people_who_change_their_minds(
    trained: TrainResult, make_evidence: Callable[..., Evidence]
) -> None:
    model = as_grader(LocalScorer(trained.adapter_dir))
    right = [(f"service={s} level=dead hour={h}", toy_answer(s, "dead"), toy_answer(s, "high")) for s, h in HELD_OUT]
    pairs = [JudgedPair(ask, ({"role": "user", "content": ask},), good, bad, None) for ask, good, bad in right]
    made = replace(make_evidence(str, str), reward_model=model)
    for judged, drifted in ((pairs, 0.0), ([replace(p, preferred=p.other, other=p.preferred) for p in pairs], 1.0)):
        gate = calibration(replace(made, judged=judged))[1]
        assert (gate.suite, gate.metrics["alert"]) == ("calibration[reward_model]", drifted), gate


def test_grader_version_names_its_reward_model(trained: TrainResult) -> None:
    scorer = LocalScorer(trained.adapter_dir)
    config = {"type": "reward_model", "adapter_sha256": trained.adapter_sha256}
    one, other = (
        make_grader(config, at_hand=AtHand(scorer=scorer)),
        make_grader({**config, "temperature": 2.0}, at_hand=AtHand(scorer=scorer)),
    )
    assert one.version != other.version
    with pytest.raises(InputError, match="is not the reward model that answers"):
        make_grader({**config, "adapter_sha256": "0" * 64}, at_hand=AtHand(scorer=scorer))
    with pytest.raises(InputError, match="has no reward model to ask"):
        make_grader({"type": "multi", "graders": {"a": config}, "calculate_output": "a"})


@pytest.fixture
def address(trained: TrainResult) -> Iterator[str]:
    """The reward model behind HTTP, in a thread of this process."""
    from aiohttp import web

    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        runner = web.AppRunner(scoring_app(LocalScorer(trained.adapter_dir)))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append((runner, runner.addresses[0][1]))
        ready.set()

    def work() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{found[0][1]}"
    asyncio.run_coroutine_threadsafe(found[0][0].cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_scores_over_http_are_those_of_this_process(address: str, trained: TrainResult) -> None:
    chat = [*ASKED["messages"], {"role": "assistant", "content": toy_answer("api", "dead")}]
    remote = HttpScorer(address)
    assert remote.adapter_sha256 == trained.adapter_sha256
    assert remote.scores([chat]) == pytest.approx(LocalScorer(trained.adapter_dir).scores([chat]), abs=1e-5)
    for wrong in ([{"role": "user", "content": 7}], [7]):
        with pytest.raises(UnavailableError, match="does not answer"):
            remote.scores([wrong])  # type: ignore[list-item]


def test_grader_service_asks_the_address_of_its_settings_only(address: str, trained: TrainResult) -> None:
    config = {"type": "reward_model", "adapter_sha256": trained.adapter_sha256}
    sample = {"output_text": toy_answer("api", "dead")}
    local = make_grader(config, at_hand=AtHand(scorer=LocalScorer(trained.adapter_dir))).grade(ASKED, sample)

    async def ask() -> float | None:
        grading = Grading(GraderSettings(reward_model_url=address))
        by = asyncio.get_running_loop().time() + 30
        found = await grading.grade(await grading.grader(config), ASKED, sample, by)
        with pytest.raises(InputError, match="url"):
            await grading.grader({**config, "url": "http://10.0.0.1"})
        await grading.close()
        return found.reward

    assert asyncio.run(ask()) == pytest.approx(local.reward, abs=1e-5)
    with pytest.raises(InputError, match="has no reward model to ask"):
        asyncio.run(Grading(GraderSettings()).grader(config))


def test_reward_model_that_went_away_abstains(trained: TrainResult) -> None:
    class Gone:
        adapter_sha256 = trained.adapter_sha256

        def scores(self, conversations: Any) -> list[float]:
            raise UnavailableError("the reward model does not answer")

    grader = make_grader(
        {"type": "reward_model", "adapter_sha256": trained.adapter_sha256}, at_hand=AtHand(scorer=Gone())
    )
    result = grader.grade(ASKED, {"output_text": "x"})
    assert result.reward is None and "does not answer" in result.reason


def test_adapter_that_answers_is_no_reward_model(config_of: Callable[..., TrainConfig]) -> None:
    result = train(config_of("sft", max_steps=1))
    with pytest.raises(InputError, match="answers and does not score"):
        LocalScorer(result.adapter_dir)


def test_calibration_by_hand() -> None:
    # two pairs at margin ln 3: 75 % sure, one right, one wrong; one tie
    margin = math.log(3)
    found = measure_scores(np.array([margin, 0.0, 0.0]), np.array([0.0, margin, 0.0]), ["a", "a", "b"])
    assert found.pair_accuracy == pytest.approx(0.5)
    assert found.loss == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3, abs=1e-6)
    assert found.calibration_error == pytest.approx((2 * 0.25 + 0) / 3)
    assert (found.by_origin, found.by_category) == ({"a": 0.5, "b": 0.5}, {})
    by_task = measure_scores(np.array([margin, 0.0, 1.0]), np.array([0.0, margin, 0.0]), list("abc"), ["t", None, "t"])
    assert by_task.as_metrics()["heldout/pair_accuracy_in_t"] == 1.0 and by_task.by_category["unnamed"] == 0.0
    assert [(round(b.confidence, 6), b.accuracy, b.pairs) for b in reliability(np.array([margin, -margin]))] == [
        (0.75, 0.5, 2)
    ]


def test_a_pair_that_does_not_fit_takes_only_its_own_origin_along(
    toy_base: Path, toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_data(toy_dataset, "preference").train.slice(0, 4)
    rows = table.to_pylist()
    rows[1]["prompt"] = json.dumps([{"role": "user", "content": "far too long " * 200}])
    rows = [{**row, "category": f"task-{n}"} for n, row in enumerate(rows)]
    pairs, encoder = pa.Table.from_pylist(rows, table.schema), Encoder(load_tokenizer(str(toy_base)), 256)
    assert encoder.scored(pairs).kept == [0, 2, 3]
    monkeypatch.setattr("train.calibration.score_ids", lambda model, rows: [float(len(row)) for row in rows])
    found = calibrate(None, encoder, pairs)
    assert found.pairs == 3 and set(found.by_category) == {"task-0", "task-2", "task-3"}
    assert set(found.by_origin) == {row["origin"] for n, row in enumerate(rows) if n != 1}


def test_fitted_temperature_recovers_the_one_that_made_the_outcomes() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 2, 40_000)
    won = random.random(40_000) < 1 / (1 + np.exp(-truth))
    assert fit_temperature(3 * np.where(won, truth, -truth)) == pytest.approx(3, rel=0.05)
