"""The event that a job has ended, for whoever wants to hear of it."""

from sqlalchemy.engine import Engine

from cluster.jobs import Job
from data.events import Event, parse_body
from data.log import EventLog


def append_job_ended(engine: Engine, job: Job, error: BaseException | None = None) -> None:
    """`job.ended`, once for each try of a job."""
    body = {
        "job_id": job.job_id,
        "job": job.kind,
        "state": job.state,
        "dataset_id": job.dataset_id,
        "reason": job.error,
        "cause": None if error is None else type(error).__name__,
    }
    given = {name: value for name, value in body.items() if value is not None}
    event = Event(
        "job.ended",
        job.tenant,
        job.workspace,
        parse_body("job.ended", given),
        event_id=f"job:{job.job_id}:{job.retries}:{job.state}",
        agent=job.agent,
    )
    EventLog(engine).append([event])
