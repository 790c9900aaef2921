"""Files, jobs, events and checkpoints in OpenAI's shapes.

Source: https://platform.openai.com/docs/api-reference/fine-tuning
"""

from typing import Any

from cluster.clock import SECOND_US
from cluster.job_events import JobEvent
from cluster.jobs import Job
from data.finetuning.uploads import StoredFile

Json = dict[str, Any]
ENDED = ("succeeded", "failed", "cancelled")
STATUSES = ("validating_files", "queued", "running", "paused", *ENDED)


def file_object(stored: StoredFile) -> Json:
    """A file."""
    return {
        "id": stored.file_id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": stored.created_at_us // SECOND_US,
        "expires_at": None,
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
        "status_details": None,
    }


def status_of(job: Job) -> str:
    """The API's word for a state: a job has succeeded when its model is served, not before."""
    if job.state == "pending":
        return "queued" if job.dataset_id else "validating_files"
    if job.state == "completed":
        return "succeeded" if job.fine_tuned_model else "running"
    return job.state


def job_object(job: Job) -> Json:
    """A job."""
    asked, progress, status = job.request or {}, job.progress or {}, status_of(job)
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": job.created_at_us // SECOND_US,
        "error": _error(job),
        "estimated_finish": _estimate(job, progress) if status == "running" else None,
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": _seconds(job.finished_at_us) if status in ENDED else None,
        "hyperparameters": asked["method"][asked["method"]["type"]].get("hyperparameters", {}),
        "integrations": [],
        "metadata": asked.get("metadata"),
        "method": asked["method"],
        "model": asked["model"],
        "organization_id": job.tenant,
        "result_files": [result_file_id(job.job_id)] if status == "succeeded" else [],
        "seed": asked["seed"],
        "status": status,
        "trained_tokens": _tokens(progress) if status == "succeeded" else None,
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
    }


def result_file_id(job_id: str) -> str:
    """The file with the curve of a job."""
    return f"file-results-{job_id.removeprefix('ftjob-')}"


def event_object(event: JobEvent) -> Json:
    """An event; checkpoints are messages here."""
    return {
        "id": event_id(event),
        "object": "fine_tuning.job.event",
        "created_at": event.at_us // SECOND_US,
        "level": event.level,
        "message": event.message,
        "data": event.data,
        "type": "metrics" if event.kind == "metrics" else "message",
    }


def event_id(event: JobEvent) -> str:
    """Names an event, and is the cursor behind it."""
    return f"ftevent-{event.job_id.removeprefix('ftjob-')}-{event.number}"


def checkpoint_id(event: JobEvent) -> str:
    """Names a checkpoint, and is the cursor behind it."""
    return f"ftckpt-{event.job_id.removeprefix('ftjob-')}-{event.number}"


def number_of(cursor: str) -> int | None:
    """The number in an event's or a checkpoint's id."""
    number = cursor.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None


def checkpoint_object(event: JobEvent, job: Job) -> Json:
    """A checkpoint."""
    data = event.data or {}
    served = (job.request or {})["served_as"]
    metrics = {
        "step": data.get("step"),
        "train_loss": data.get("loss"),
        "train_mean_token_accuracy": data.get("mean_token_accuracy"),
        "valid_loss": data.get("eval_loss"),
        "valid_mean_token_accuracy": data.get("eval_mean_token_accuracy"),
        "full_valid_loss": data.get("eval_loss"),
        "full_valid_mean_token_accuracy": data.get("eval_mean_token_accuracy"),
    }
    return {
        "id": checkpoint_id(event),
        "object": "fine_tuning.job.checkpoint",
        "created_at": event.at_us // SECOND_US,
        "fine_tuned_model_checkpoint": served if data.get("final") else f"{served}:ckpt-step-{data.get('step')}",
        "fine_tuning_job_id": job.job_id,
        "metrics": metrics,
        "step_number": int(data.get("step") or 0),
    }


def page(data: list[Json], *, has_more: bool) -> Json:
    """One page of a list."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def _error(job: Job) -> Json | None:
    if job.state != "failed":
        return None
    code = "invalid_training_file" if job.dataset_id is None else "training_failed"
    return {"code": code, "message": job.error or "the job failed", "param": None}


def _estimate(job: Job, progress: Json) -> int | None:
    """When it will end, if it goes on as fast as since its start."""
    step, steps = progress.get("step"), progress.get("steps")
    if not step or not steps or job.started_at_us is None:
        return None
    left_us = (int(progress["at_us"]) - job.started_at_us) / step * (steps - step)
    return int((progress["at_us"] + left_us) // SECOND_US)


def _tokens(progress: Json) -> int | None:
    tokens = progress.get("num_tokens")
    return None if tokens is None else int(tokens)


def _seconds(at_us: int | None) -> int | None:
    return None if at_us is None else at_us // SECOND_US
