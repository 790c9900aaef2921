import time

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US
from cluster.errors import ConflictError, NotFoundError
from cluster.jobs import LOST, UNCOUNTED, Jobs, Usage, count_running
from cluster.runners import Runners
from cluster.signs_of_life import signs_of_life


@pytest.fixture
def jobs(database: Engine) -> Jobs:
    return Jobs(database, "acme", "main")


def test_job_goes_from_pending_to_completed(jobs: Jobs) -> None:
    job = jobs.create("dpo", agent="triage", dataset_id="d1", config={"beta": 0.1})
    assert (job.state, job.retries, job.config) == ("pending", 0, {"beta": 0.1})
    assert jobs.start(job.job_id).state == "running"
    jobs.progress(job.job_id, {"step": 3})
    progress = jobs.get(job.job_id).progress
    assert progress is not None and progress["step"] == 3
    done = jobs.finish(job.job_id, output_version="triage/2")
    assert (done.state, done.output_version) == ("completed", "triage/2")
    assert done.started_at_us is not None and done.finished_at_us is not None


def test_failed_job_is_tried_again_and_counted(jobs: Jobs) -> None:
    job_id = jobs.create("sft").job_id
    jobs.start(job_id)
    assert jobs.fail(job_id, "disk full").error == "disk full"
    again = jobs.retry(job_id)
    assert (again.state, again.retries, again.error) == ("pending", 1, None)


@pytest.mark.parametrize("act", ["start", "finish", "retry"])
def test_completed_job_stays_completed(jobs: Jobs, act: str) -> None:
    job_id = jobs.create("sft").job_id
    jobs.start(job_id)
    jobs.finish(job_id)
    with pytest.raises(ConflictError, match="is completed, not"):
        getattr(jobs, act)(job_id)


def test_one_tenant_cannot_run_more_than_it_may(jobs: Jobs) -> None:
    first = jobs.create("sft", max_concurrent=1)
    jobs.start(first.job_id)
    with pytest.raises(ConflictError, match="max_concurrent_jobs is 1"):
        jobs.create("sft", max_concurrent=1)
    Jobs(jobs.engine, "other", "main").create("sft", max_concurrent=1)
    jobs.finish(first.job_id)
    jobs.create("sft", max_concurrent=1)


def test_a_loop_takes_no_place_and_uses_no_hours(jobs: Jobs) -> None:
    for kind in UNCOUNTED:
        spend(jobs, jobs.create(kind).job_id, seconds=100, gpus=1)
    jobs.start(jobs.create("loop").job_id)
    jobs.create("sft", max_concurrent=1)
    assert jobs.usage(0) == Usage(0, 0)


def spend(jobs: Jobs, job_id: str, *, seconds: int, gpus: float) -> None:
    """Let a job have run for so long."""
    jobs.start(job_id, gpus=gpus)
    with jobs.engine.begin() as connection:
        back = {"us": seconds * SECOND_US, "id": job_id}
        connection.execute(
            sa.text("UPDATE training_jobs SET started_at_us = started_at_us - :us WHERE job_id = :id"), back
        )
    jobs.fail(job_id, "enough")


def test_gpu_hours_of_every_life_and_workspace_count(jobs: Jobs) -> None:
    first, second = jobs.create("sft").job_id, Jobs(jobs.engine, "acme", "other")
    spend(jobs, first, seconds=100, gpus=2)
    jobs.retry(first)
    spend(jobs, first, seconds=50, gpus=4)
    spend(second, second.create("dpo").job_id, seconds=10, gpus=0)
    spend(other := Jobs(jobs.engine, "rival", "main"), other.create("dpo").job_id, seconds=1000, gpus=1)
    used = jobs.usage(0)
    assert (used.run_s, used.gpu_s) == (pytest.approx(160, abs=3), pytest.approx(400, abs=10))
    jobs.start(jobs.create("sft").job_id, gpus=1)  # what runs counts as far as it is
    assert used.run_s <= jobs.usage(0).run_s < used.run_s + 3


def test_a_place_is_taken_when_a_job_starts_in_whatever_workspace(jobs: Jobs) -> None:
    other = Jobs(jobs.engine, "acme", "b")
    waiting = [where.create("sft", max_concurrent=1).job_id for where in (jobs, other)]
    jobs.start(waiting[0], max_concurrent=1)
    with pytest.raises(ConflictError, match="max_concurrent_jobs is 1"):
        other.start(waiting[1], max_concurrent=1)
    assert other.get(waiting[1]).state == "pending"
    with pytest.raises(ConflictError, match="max_concurrent_jobs is 1"):
        other.create("sft", max_concurrent=1)
    other.start(waiting[1], max_concurrent=1, silent_s=-1)  # the other has been silent for longer than that


def running(jobs: Jobs) -> int:
    with jobs.engine.connect() as connection:
        return count_running(connection, jobs.tenant, 60)


def test_an_sft_run_beside_a_job_of_the_api_runs_in_its_place(jobs: Jobs) -> None:
    jobs.create("dpo", job_id="ftjob-1", request={"model": "m"})
    assert Runners(jobs.engine).claim("ftjob-1", ("pending",)) is not None
    jobs.start(jobs.create("sft", job_id="ftjob-1.sft").job_id)
    assert running(jobs) == 1
    jobs.create("sft", max_concurrent=2)
    for name in ("mine.sft", "mine.dpo"):  # of the command line: whatever runs, counts
        jobs.start(jobs.create("sft", job_id=name).job_id)
    assert running(jobs) == 3


def test_a_job_of_the_api_that_waited_long_takes_its_place_once_started(jobs: Jobs) -> None:
    jobs.create("dpo", job_id="ftjob-1", request={"model": "m"})
    with jobs.engine.begin() as connection:
        connection.execute(sa.text("UPDATE training_jobs SET created_at_us = 0"))
    Runners(jobs.engine).claim("ftjob-1", ("pending",))
    assert running(jobs) == 1


def test_a_sign_of_life_keeps_what_the_job_said(jobs: Jobs) -> None:
    job_id = jobs.create("sft").job_id
    jobs.start(job_id)
    jobs.progress(job_id, {"step": 3, "at_us": 1})
    before = jobs.get(job_id).progress
    with signs_of_life(jobs, [job_id], silent_s=0.1):
        time.sleep(0.3)
    after = jobs.get(job_id).progress
    assert before is not None and after is not None
    assert after["step"] == 3 and after["at_us"] > before["at_us"]
    jobs.finish(job_id)
    jobs.beat(job_id)
    assert jobs.get(job_id).state == "completed"


def test_silent_job_counts_as_failed(jobs: Jobs) -> None:
    job_id = jobs.create("sft").job_id
    jobs.start(job_id)
    assert jobs.fail_lost(silent_s=60) == []
    assert jobs.fail_lost(silent_s=-1) == [job_id]
    assert jobs.get(job_id).error == LOST


def test_same_name_twice_and_unknown_names_are_refused(jobs: Jobs) -> None:
    jobs.create("sft", job_id="mine")
    with pytest.raises(ConflictError, match="exists already"):
        jobs.create("sft", job_id="mine")
    with pytest.raises(NotFoundError, match="no job 'yours'"):
        jobs.get("yours")
    with pytest.raises(NotFoundError):
        Jobs(jobs.engine, "other", "main").get("mine")
