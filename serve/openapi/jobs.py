"""Fine-tuning jobs: made, seen, acted on; what they said, and their checkpoints."""

from typing import get_args

from cluster.job_events import Level
from serve.finetuning.http import ACTIONS
from serve.finetuning.jobs_http import MAX_PAGE
from serve.finetuning.objects import STATUSES
from serve.finetuning.requests import (
    AUTO,
    FIELDS,
    HYPERPARAMETERS,
    MAX_METADATA,
    MAX_SEED,
    MEANINGLESS,
    METADATA_NAME_CHARACTERS,
    METADATA_VALUE_CHARACTERS,
    METHODS,
    SUFFIX,
)
from serve.finetuning.requests import (
    WHOLE as WHOLE_NUMBERS,
)
from serve.openapi.shapes import (
    NUMBER,
    OBJECT,
    TEXT,
    WHOLE,
    Schema,
    answered,
    as_json,
    closed,
    events,
    in_path,
    in_query,
    maybe,
    operation,
    page,
    ref,
)

JOBS, JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
NAMED = [in_path("job_id", "Its id.")]
ACTS = {
    "pause": "Stop a job, to be resumed where it stopped.",
    "resume": "Have a paused or failed job go on.",
    "cancel": "End a job for good.",
}
LIMIT = in_query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}, "So many at most.")
AFTER = in_query("after", TEXT, "The id that the page begins behind.")


def paths(shared: Schema) -> Schema:
    """The routes of jobs."""
    shared["FineTuningRequest"] = _request()
    shared["FineTuningMethod"] = {"anyOf": [_method(kind) for kind in METHODS]}
    shared["FineTuningJob"] = _job()
    shared["FineTuningEvent"] = _event()
    shared["FineTuningCheckpoint"] = _checkpoint()
    return {
        JOBS: {"get": _listed(), "post": _created()},
        JOB: {"get": _retrieved()},
        **{f"{JOB}/{action}": {"post": _act(action)} for action in ACTIONS},
        f"{JOB}/events": {"get": _events()},
        f"{JOB}/checkpoints": {"get": _checkpoints()},
    }


def _created() -> Schema:
    return operation(
        "create_fine_tuning_job",
        "Train a model on a file.",
        answered("The job, waiting to be started.", ref("FineTuningJob")),
        refused=("404", "409"),
        body=as_json(ref("FineTuningRequest")),
        description="With the header `idempotency-key` the same request again answers with the same job.",
    )


def _listed() -> Schema:
    metadata: Schema = {
        "name": "metadata",
        "in": "query",
        "style": "deepObject",
        "explode": True,
        "schema": {"type": "object", "additionalProperties": TEXT},
        "description": "Only jobs with these values: `metadata[key]=value`.",
    }
    answer = answered("One page, the newest first.", page(ref("FineTuningJob")))
    parameters = [LIMIT, AFTER, metadata]
    return operation("fine_tuning_jobs", "List jobs.", answer, refused=("400", "404"), parameters=parameters)


def _retrieved() -> Schema:
    answer = answered("The job.", ref("FineTuningJob"))
    return operation("fine_tuning_job", "See how a job is.", answer, refused=("404", "405"), parameters=NAMED)


def _act(action: str) -> Schema:
    answer = answered("The job in its new state.", ref("FineTuningJob"))
    name = f"{action}_fine_tuning_job"
    return operation(name, ACTS[action], answer, refused=("404", "405", "409"), parameters=NAMED)


def _events() -> Schema:
    stream = in_query("stream", {"enum": ["false", "true"]}, "`true`: server-sent events, until the job has ended.")
    answer = answered("One page, the newest first; or a stream, the oldest first.", page(ref("FineTuningEvent")))
    answer["content"] |= events()
    return operation(
        "fine_tuning_events",
        "See what a job said.",
        answer,
        refused=("400", "404"),
        parameters=[*NAMED, LIMIT, AFTER, stream],
    )


def _checkpoints() -> Schema:
    answer = answered("One page, the newest first.", page(ref("FineTuningCheckpoint")))
    return operation(
        "fine_tuning_checkpoints",
        "See the checkpoints of a job.",
        answer,
        refused=("400", "404"),
        parameters=[*NAMED, LIMIT, AFTER],
    )


def _request() -> Schema:
    known = {
        "model": TEXT | {"description": "A base model, an agent (its stable version), or a version."},
        "training_file": TEXT | {"description": "The id of a file."},
        "validation_file": maybe(TEXT),
        "method": ref("FineTuningMethod"),
        "hyperparameters": _hyperparameters("supervised") | {"description": "Of `supervised`, without a `method`."},
        "suffix": maybe({"type": "string", "pattern": f"^{SUFFIX.pattern}$"}),
        "seed": maybe({"type": "integer", "minimum": 0, "maximum": MAX_SEED}),
        "integrations": maybe({"type": "array", "maxItems": 0}),
        "metadata": maybe(_metadata()),
    }
    return {
        "type": "object",
        "properties": {name: known[name] for name in sorted(FIELDS)},
        "required": ["model", "training_file"],
        "additionalProperties": False,
    }


def _metadata() -> Schema:
    return {
        "type": "object",
        "maxProperties": MAX_METADATA,
        "propertyNames": {"maxLength": METADATA_NAME_CHARACTERS},
        "additionalProperties": {"type": "string", "maxLength": METADATA_VALUE_CHARACTERS},
    }


def _method(kind: str) -> Schema:
    own: Schema = {"hyperparameters": _hyperparameters(kind)}
    required = []
    if kind == "reinforcement":
        own |= {"grader": ref("Grader"), "response_format": OBJECT}
        required = ["grader"]
    described = {"type": "object", "properties": own, "required": required, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, kind: described},
        "required": ["type", *([kind] if required else [])],
        "additionalProperties": False,
    }


def _hyperparameters(kind: str) -> Schema:
    """Numbers above 0, or `auto`."""
    numbers = {
        name: {"type": "integer", "minimum": 1} if name in WHOLE_NUMBERS else {"type": "number", "exclusiveMinimum": 0}
        for name in HYPERPARAMETERS[kind]
        if name not in MEANINGLESS
    }
    values: dict[str, Schema] = {name: {"anyOf": [{"const": AUTO}, number]} for name, number in numbers.items()}
    values |= {name: {"const": AUTO} for name in HYPERPARAMETERS[kind] if name in MEANINGLESS}
    return {"type": "object", "properties": values, "additionalProperties": False}


def _job() -> Schema:
    error = closed({"code": TEXT, "message": TEXT, "param": maybe(TEXT)})
    return closed(
        {
            "id": TEXT,
            "object": {"const": "fine_tuning.job"},
            "created_at": WHOLE,
            "error": maybe(error),
            "estimated_finish": maybe(WHOLE),
            "fine_tuned_model": maybe(TEXT),
            "finished_at": maybe(WHOLE),
            "hyperparameters": OBJECT,
            "integrations": {"type": "array", "maxItems": 0},
            "metadata": maybe({"type": "object", "additionalProperties": TEXT}),
            "method": ref("FineTuningMethod"),
            "model": TEXT,
            "organization_id": TEXT,
            "result_files": {"type": "array", "items": TEXT},
            "seed": WHOLE,
            "status": {"enum": list(STATUSES)},
            "trained_tokens": maybe(WHOLE),
            "training_file": TEXT,
            "validation_file": maybe(TEXT),
        }
    )


def _event() -> Schema:
    return closed(
        {
            "id": TEXT,
            "object": {"const": "fine_tuning.job.event"},
            "created_at": WHOLE,
            "level": {"enum": list(get_args(Level))},
            "message": TEXT,
            "data": maybe(OBJECT),
            "type": {"enum": ["message", "metrics"]},
        }
    )


def _checkpoint() -> Schema:
    names = (
        "step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
        "full_valid_loss", "full_valid_mean_token_accuracy",
    )  # fmt: skip
    return closed(
        {
            "id": TEXT,
            "object": {"const": "fine_tuning.job.checkpoint"},
            "created_at": WHOLE,
            "fine_tuned_model_checkpoint": TEXT,
            "fine_tuning_job_id": TEXT,
            "metrics": closed({name: maybe(NUMBER) for name in names}),
            "step_number": WHOLE,
        }
    )
