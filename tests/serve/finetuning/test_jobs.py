"""`/v1/fine_tuning/jobs` through the official client, on SQLite and PostgreSQL; nothing trains here."""

import threading
from typing import Any, cast
from unittest.mock import Mock

import httpx
import openai
import pytest

from cluster.errors import ConflictError, InputError
from cluster.job_events import note
from cluster.jobs import Job, Jobs
from cluster.runners import Runners
from serve.finetuning.dispatcher import Dispatcher, Processes
from serve.finetuning.requests import overrides_of, parse_create, parse_method
from serve.router import RouterApp
from tests.serve.finetuning.conftest import Api, Json, chat_rows, pair_rows
from tests.serve.upstream import Server

GRADER = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
}


def create(api: Api, training: str, client: openai.OpenAI | None = None, **more: Any) -> Any:
    return (client or api.client).fine_tuning.jobs.create(model="toy", training_file=training, **more)


def dpo(**hyperparameters: Any) -> Json:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def items(count: int) -> list[Json]:
    return [{"messages": [{"role": "user", "content": f"{n}?"}], "answer": str(n)} for n in range(count)]


def test_job_shows_what_was_asked_for(api: Api) -> None:
    training, validation = api.upload(pair_rows(12)), api.upload(pair_rows(10, 5))
    made = create(
        api, training, validation_file=validation, suffix="x-1", seed=3, metadata={"a": "b"}, method=dpo(beta=0.2)
    )
    assert made.method.dpo.hyperparameters.beta == 0.2
    assert made.method.dpo.hyperparameters.n_epochs == "auto"
    assert (made.training_file, made.validation_file, made.seed) == (training, validation, 3)
    assert (made.status, made.organization_id, made.object) == ("validating_files", "default", "fine_tuning.job")
    assert api.client.fine_tuning.jobs.retrieve(made.id) == made
    assert made.fine_tuned_model is None and made.finished_at is None and made.result_files == []


def test_jobs_are_listed_by_page_and_metadata_and_only_to_their_tenant(api: Api) -> None:
    training = api.upload(chat_rows(10))
    made = [create(api, training, metadata={"n": str(n % 2)}).id for n in range(3)]  # one file, several jobs
    assert [job.id for job in api.client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in api.client.fine_tuning.jobs.list(metadata={"n": "0"})] == [made[2], made[0]]
    other = api.client_of("other")
    assert list(other.fine_tuning.jobs.list()) == []
    for refused in (
        other.fine_tuning.jobs.retrieve,
        other.fine_tuning.jobs.cancel,
        other.fine_tuning.jobs.list_events,
        other.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            refused(made[0])
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        create(api, training, other)


BAD_REQUESTS: dict[str, tuple[Json, str, str]] = {
    "epochs": ({"method": dpo(n_epochs=0)}, "method.dpo.hyperparameters.n_epochs", "whole number above 0"),
    "half an epoch": ({"method": dpo(n_epochs=0.5)}, "method.dpo.hyperparameters.n_epochs", "whole number"),
    "epochs over limit": ({"method": dpo(n_epochs=101)}, "method.dpo.hyperparameters.n_epochs", "max_epochs"),
    "steps over limit": (
        {"method": dpo(n_epochs=99, batch_size=1)},
        "method.dpo.hyperparameters.n_epochs",
        "means 1188 steps",
    ),
    "batch": ({"method": dpo(batch_size="big")}, "method.dpo.hyperparameters.batch_size", "whole number"),
    "beta": ({"method": dpo(beta=-1)}, "method.dpo.hyperparameters.beta", "number above 0"),
    "rate": (
        {"method": dpo(learning_rate_multiplier=1e6)},
        "method.dpo.hyperparameters.learning_rate_multiplier",
        "gives a learning rate of 50",
    ),
    "no rate": (
        {"method": dpo(learning_rate_multiplier=1e-320)},
        "method.dpo.hyperparameters.learning_rate_multiplier",
        "gives a learning rate of 0",
    ),
    "beta of sft": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
        "method.supervised.hyperparameters.beta",
        "is not known here",
    ),
    "method": ({"method": {"type": "ppo"}}, "method.type", "must be one of supervised, dpo, reinforcement"),
    "format": ({}, "training_file", "has the format `preference`, supervised needs `chat`"),
    "suffix": ({"suffix": "a:b", "method": dpo()}, "suffix", "letters, digits"),
    "seed": ({"seed": -1, "method": dpo()}, "seed", "whole number"),
    "metadata": ({"metadata": {"a": "x" * 600}, "method": dpo()}, "metadata", "at most 16 texts"),
    "integration": ({"integrations": [{"type": "wandb"}], "method": dpo()}, "integrations", "are not supported"),
    "unknown": ({"extra_body": {"colour": 1}, "method": dpo()}, "colour", "is not known here"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_names_field_and_rule(refusing: Api, case: str) -> None:
    request, param, rule = BAD_REQUESTS[case]
    with pytest.raises(openai.BadRequestError, match=rule) as caught:
        create(refusing, refusing.upload(pair_rows(12)), **request)
    assert caught.value.param == param
    assert list(refusing.client.fine_tuning.jobs.list()) == []


def test_unknown_model_and_files_are_refused(refusing: Api) -> None:
    training = refusing.upload(chat_rows(10))
    with pytest.raises(openai.NotFoundError, match=r"'gpt-x' does not exist.*Known: .*toy"):
        refusing.client.fine_tuning.jobs.create(model="gpt-x", training_file=training)
    with pytest.raises(openai.BadRequestError, match="there is no file 'file-x'"):
        create(refusing, "file-x")
    twin = refusing.upload(chat_rows(10))
    for validation in (training, twin):
        with pytest.raises(openai.BadRequestError, match="same content as training_file"):
            create(refusing, training, validation_file=validation)


def test_reinforcement_needs_a_grader_that_can_read_every_item(api: Api) -> None:
    training = api.upload(items(12))
    job = create(api, training, method={"type": "reinforcement", "reinforcement": {"grader": GRADER}})
    assert job.method.reinforcement.grader.type == "string_check"
    with pytest.raises(openai.BadRequestError, match="is missing") as caught:
        create(api, training, method={"type": "reinforcement", "reinforcement": {}})
    assert caught.value.param == "method.reinforcement.grader"
    broken = GRADER | {"operation": "almost"}
    with pytest.raises(openai.BadRequestError, match="operation"):
        create(api, training, method={"type": "reinforcement", "reinforcement": {"grader": broken}})
    gap = api.upload([*items(11), {"messages": items(1)[0]["messages"]}])
    with pytest.raises(openai.BadRequestError, match=r"line 12: item\.answer=None is missing"):
        create(api, gap, method={"type": "reinforcement", "reinforcement": {"grader": GRADER}})


def test_two_requests_at_once_never_share_the_last_place(api: Api) -> None:
    training = api.upload(chat_rows(10))
    create(api, training), create(api, training)
    outcomes: list[str] = []

    def one_more() -> None:
        try:
            outcomes.append(create(api, training).status)
        except openai.RateLimitError as error:
            outcomes.append(str(error.code))

    threads = [threading.Thread(target=one_more) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["limit_reached"] * 3 + ["validating_files"]
    other = api.client_of("other")
    create(api, api.upload(chat_rows(10), other), other)  # another tenant has places of its own


def test_create_sent_twice_with_one_idempotency_key_is_one_job(api: Api) -> None:
    training = api.upload(chat_rows(10))
    same = {"extra_headers": {"idempotency-key": "k1"}}
    first, again = create(api, training, **same), create(api, training, **same)
    assert first.id == again.id
    assert len(list(api.client.fine_tuning.jobs.list())) == 1


def test_tenant_that_used_up_its_hours_is_refused(api: Api) -> None:
    training = api.upload(chat_rows(10))
    jobs = Jobs(api.database, "default", "default")
    spent = jobs.create("sft").job_id
    jobs.start(spent)
    jobs.finish(spent)
    for column, hours, said in (("used_s", 200, r"200\.0 hours"), ("used_gpu_s", 500, r"500\.0 GPU-hours")):
        with api.database.begin() as connection:
            connection.exec_driver_sql("UPDATE training_jobs SET used_s = 0, used_gpu_s = 0")
            connection.exec_driver_sql(f"UPDATE training_jobs SET {column} = 3600 * {hours}")
        with pytest.raises(openai.RateLimitError, match=f"trained for {said}") as caught:
            create(api, training)
        assert caught.value.code == "insufficient_quota"
    other = api.client_of("other")
    create(api, api.upload(chat_rows(10), other), other)


def test_states_follow_pause_resume_and_cancel(api: Api) -> None:
    jobs = api.client.fine_tuning.jobs
    job = create(api, api.upload(chat_rows(10)))
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "validating_files"
    assert jobs.cancel(job.id).status == "cancelled"
    for act in (jobs.pause, jobs.resume, jobs.cancel):
        with pytest.raises(openai.ConflictError, match="is cancelled, not"):
            act(job.id)
    said = [event.message for event in jobs.list_events(job.id)]
    assert said == [
        "The job was cancelled", "The job goes on", "The job was paused", f"Created fine-tuning job: {job.id}",
    ]  # fmt: skip


def test_process_of_a_paused_job_must_be_gone_before_it_is_resumed(api: Api) -> None:
    job = create(api, api.upload(chat_rows(10)))
    runners, jobs = Runners(api.database), Jobs(api.database, "default", "default")
    token = runners.claim(job.id, ("pending",))
    assert token is not None and runners.claim(job.id, ("pending",)) is None
    jobs.pause(job.id)
    with pytest.raises(ConflictError, match="somebody paused it"):
        runners.report(job.id, token)
    with pytest.raises(ConflictError, match="has not ended yet"):
        jobs.resume(job.id)
    runners.release(job.id, token)
    assert jobs.resume(job.id).state == "pending"
    again = runners.claim(job.id, ("pending",))
    with pytest.raises(ConflictError, match="not this process's"):
        runners.report(job.id, token)
    runners.report(job.id, str(again))


class Ended:
    """Processes that are all gone."""

    def alive(self, job: Job) -> bool:
        return False


def test_files_of_a_cancelled_job_go_before_its_process_is_let_go_of(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatcher that dies while it removes them is followed by one that does it again."""
    job = create(api, api.upload(chat_rows(10)))
    runners = Runners(api.database)
    runners.claim(job.id, ("pending",))
    api.client.fine_tuning.jobs.cancel(job.id)
    folder = api.settings.home / "training" / job.id
    folder.mkdir(parents=True)
    dispatcher = Dispatcher(api.settings, api.database, cast(Processes, Ended()))
    with monkeypatch.context() as dying:
        dying.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dispatcher._look_at(runners.find(job.id))
    assert job.id in {waiting.job_id for waiting in runners.open_jobs()}
    dispatcher._look_at(runners.find(job.id))
    assert not folder.exists() and runners.find(job.id).runner is None


def test_events_are_paged_by_cursor_without_gap_or_repeat(api: Api) -> None:
    job = create(api, api.upload(chat_rows(10)))
    threads = [
        threading.Thread(target=lambda n=n: [note(api.database, job.id, f"{n}.{k}") for k in range(10)])  # type: ignore[misc]
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = list(api.client.fine_tuning.jobs.list_events(job.id, limit=7))
    assert [int(event.id.rpartition("-")[2]) for event in events] == list(range(31, 0, -1))
    with pytest.raises(openai.BadRequestError, match="after names no event"):
        api.client.fine_tuning.jobs.list_events(job.id, after="nonsense")


def test_another_router_answers_for_the_same_job(api: Api) -> None:
    job = create(api, api.upload(chat_rows(10)))
    second = RouterApp(api.settings, default_engine_url="http://127.0.0.1:9")
    second.watcher.refresh()
    with Server(second, lifespan="on") as url:
        client = api.client.with_options(base_url=f"{url}/v1")
        assert client.fine_tuning.jobs.retrieve(job.id) == job
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        client.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/fine_tuning/jobs/x/nothing", 404),
        ("PUT", "/v1/fine_tuning/jobs", 405),
        ("GET", "/v1/fine_tuning/jobs/x/cancel", 405),
        ("POST", "/v1/fine_tuning/jobs/x/cancel", 404),
        ("POST", "/v1/fine_tuning/jobs", 400),
    ],
)
def test_wrong_paths_and_methods_keep_openai_shape(refusing: Api, method: str, path: str, status: int) -> None:
    headers = {"authorization": f"Bearer {refusing.client.api_key}"}
    answer = httpx.request(method, refusing.url + path, headers=headers, content=b"[")
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (4, 4), (6, 3), (7, 1), (32, 4)])
def test_batch_size_is_met_exactly_within_memory(refusing: Api, batch: int, micro: int) -> None:
    found = overrides_of(parse_method({"method": dpo(batch_size=batch)}, refusing.settings), 1, refusing.settings)
    assert (found["batch_size"], found["batch_size"] * found["gradient_accumulation"]) == (micro, batch)


def reinforcement(**hyperparameters: Any) -> Json:
    return {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": hyperparameters}}


@pytest.mark.parametrize(
    ("asked", "prompts", "group"),
    [
        ({}, 2, 8),  # the sixteen examples of a step, in groups of eight answers
        ({"batch_size": 3}, 3, 8),
        ({"compute_multiplier": 2}, 2, 16),
        ({"compute_multiplier": 0.1, "batch_size": 5}, 5, 2),
    ],
)
def test_reinforcement_reads_so_many_lines_a_step_and_samples_a_group_for_each(
    refusing: Api, asked: Json, prompts: int, group: int
) -> None:
    method = parse_method({"method": reinforcement(**asked, eval_interval=7)}, refusing.settings)
    found = overrides_of(method, 1, refusing.settings)
    assert (found["group_size"], found["batch_size"] * found["gradient_accumulation"]) == (group, prompts * group)
    assert (found["eval_steps"], found["grader"]) == (7, GRADER)


def test_hyperparameters_without_a_meaning_here_are_refused(refusing: Api) -> None:
    for name in ("eval_samples", "reasoning_effort"):
        with pytest.raises(InputError, match=f"{name}=4 has no meaning"):
            parse_method({"method": reinforcement(**{name: 4})}, refusing.settings)
    training = refusing.upload(items(12))
    with pytest.raises(openai.BadRequestError, match="means 13 lines a step, and training_file has 12") as caught:
        create(refusing, training, method=reinforcement(batch_size=13))
    assert caught.value.param == "method.reinforcement.hyperparameters.batch_size"


def test_job_is_refused_where_whole_models_are_trained(refusing: Api) -> None:
    whole = refusing.settings.training.model_copy(update={"weights": "full"})
    settings = refusing.settings.model_copy(update={"training": whole})
    with pytest.raises(InputError, match=r"training\.weights=.full. makes whole models"):
        parse_create({"model": "toy", "training_file": "file-1"}, settings)
