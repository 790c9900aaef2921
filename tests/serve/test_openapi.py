"""The OpenAPI document is whole and true: it has every route, and whatever Schemathesis makes of it, every answer is
one it promises.

Half of what is sent as described names what there is: a file, a job, a model, a user.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.database import write
from cluster.job_events import note
from cluster.tables import servables
from serve.graders import ACTIONS, PREFIXES, GraderApi
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.openapi.document import PATH
from serve.router import operations
from serve.tools.call import MCP_PATH
from serve.tools.call import PATH as TOOLS_PATH
from serve.tools.deployment import open_services, tool_api
from tests.serve.conftest import Live, live_router, serve_version
from tests.serve.finetuning.conftest import chat_rows, lines
from tests.serve.upstream import Server

Json = dict[str, Any]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
AS_DESCRIBED, OTHERWISE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
GRADERS = [("POST", f"{prefix}{action}") for prefix in PREFIXES for action in ACTIONS]
CALL = f"{TOOLS_PATH}/{{name}}"
TOOLS = [("GET", TOOLS_PATH), ("POST", CALL), ("POST", MCP_PATH)]
EVERY = operations() + GRADERS + TOOLS
ARGUMENTS: Json = {
    "query_sql": {"query": "SELECT count(*) AS n FROM event_log WHERE kind = :kind", "parameters": {"kind": "label"}},
    "search_interactions": {"query": "disk full"},
    "get_record": {"interaction_id": "nobodys"},
    "submit_feedback": {"interaction_id": "nobodys", "type": "thumbs_up"},
}
FILE, JOB, MODEL = "/v1/files/{file_id}", "/v1/fine_tuning/jobs/{job_id}", "/v1/models/{model}"


@dataclass
class World:
    """Router, grader and tool server with something of everything, and their document."""

    live: Live
    secret: str
    grader_url: str
    tools_url: str
    document: Json
    schema: Any
    """The document as Schemathesis reads it."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    tools: Iterator[str] = field(default_factory=lambda: itertools.cycle(ARGUMENTS))
    tool: str = ""

    def url_of(self, path: str) -> str:
        if path in {path for _, path in TOOLS}:
            return self.tools_url
        return self.grader_url if "/graders/" in path else self.live.url

    def upload(self) -> str:
        sent = ("examples.jsonl", lines(chat_rows(12)))
        return self.live.client(self.secret).files.create(file=sent, purpose="fine-tune").id

    def job(self, *actions: str) -> str:
        """A job that nobody starts, after these were asked of it."""
        client = self.live.client(self.secret)
        job = client.fine_tuning.jobs.create(model="toy", training_file=self.upload())
        for action in actions:
            getattr(client.fine_tuning.jobs, action)(job.id)
        return job.id

    def known(self, method: str, path: str) -> Json:
        """The parts of a path that name something; what is changed is made anew."""
        if path.startswith(JOB):
            made = {"pause": (), "resume": ("pause",), "cancel": ()}.get(path.rpartition("/")[2], ("cancel",))
            job_id = self.job(*made)
            note(self.live.database, job_id, "Step 1", kind="metrics", data={"loss": 0.5})
            note(self.live.database, job_id, "Saved", kind="checkpoint", data={"step": 1, "loss": 0.5})
            return {"job_id": job_id}
        if path.startswith(FILE):
            return {"file_id": self.upload()}
        if path == MODEL:
            if method == "GET":
                return {"model": "triage/1"}
            version = f"toy/{next(self.numbers)}"
            name = f"ft:toy:default::{version[4:]}"
            serve_version(self.live.database, version, "base")
            with write(self.live.database).begin() as connection:
                connection.execute(servables.update().where(servables.c.version == version).values(alias=name))
            self.live.app.watcher.refresh()
            return {"model": name}
        if path == CALL:
            self.tool = next(self.tools)
            return {"name": self.tool}
        if path == "/v1/users/{id}":
            said = [{"role": "user", "content": "?"}]
            self.live.client(self.secret).chat.completions.create(model="triage", messages=said, user="ada")  # type: ignore[arg-type]
            self.live.events("interaction", 1)
            return {"id": "ada"}
        return {}

    def named(self, path: str) -> Json:
        """Fields of a body that name something."""
        if path in ("/v1/chat/completions", "/v1/completions"):
            return {"model": "triage"}
        if path == "/v1/fine_tuning/jobs":
            return {"model": "toy", "training_file": self.upload(), "validation_file": None}
        if path == CALL:
            return {"arguments": ARGUMENTS[self.tool], "idempotency_key": f"key-{next(self.numbers)}"}
        if path == MCP_PATH:
            called = {"name": "search_interactions", "arguments": ARGUMENTS["search_interactions"]}
            return {"id": 1, "method": "tools/call", "params": called}
        return {"file": lines(chat_rows(12))} if path == "/v1/files" else {}


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home: Path = tmp_path_factory.mktemp("openapi") / "home"
    tuning = {
        "base_models": {"toy": "/models/toy"},
        "max_active_jobs": 1000,
        "event_poll_s": 0.02,
        "resume_wait_s": 0.1,
    }
    url, name, copies = None, "", None
    if request.param == "postgres":
        copies = request.getfixturevalue("postgres_copies")
        name = copies.take()
        url = copies.url(name)
    for live in live_router(home, finetuning=tuning, grader={"deadline_s": 1.0}, database={"url": url}):
        secret = create_key(live.database, "all", "default", "default", ["admin"])
        live.app.watcher.refresh()
        services = open_services(live.settings)
        with (
            Server(GraderApi(live.settings.grader, KnownKeys(live.settings, 60.0)), "on") as grader_url,
            Server(tool_api(live.settings, services), "on") as tools_url,
        ):
            document = httpx.get(f"{live.url}{PATH}", timeout=30).json()
            yield World(live, secret, grader_url, tools_url, document, schemathesis.openapi.from_dict(document))
        services.intake.commit.close()
        services.database.dispose()
    if copies is not None:
        copies.drop(name)


def test_document_has_every_route_and_no_other(world: World) -> None:
    paths = world.document["paths"]
    described = [(method.upper(), path) for path, found in paths.items() for method in found if method != "servers"]
    assert sorted(described) == sorted(EVERY)
    names = [paths[path][method.lower()]["operationId"] for method, path in described]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_every_answer_is_one_that_is_promised(world: World, method: str, path: str) -> None:
    operation = world.schema[path][method]
    takes = world.document["paths"][path][method.lower()]
    headers = {"authorization": f"Bearer {world.secret}"}
    seen: set[int] = set()

    def ask(case: Any) -> None:
        response = case.call(base_url=world.url_of(path), headers=headers, timeout=30)
        seen.add(response.status_code)
        case.validate_response(response, checks=CHECKS, headers=headers)

    bounded = settings(
        max_examples=6, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )

    @bounded
    @given(operation.as_strategy(generation_mode=AS_DESCRIBED), st.booleans())
    def hold(case: Any, real: bool) -> None:
        if real:
            case.path_parameters = {**(case.path_parameters or {}), **world.known(method, path)}
            if isinstance(case.body, dict):
                case.body = {**case.body, **world.named(path)}
        ask(case)

    hold()
    assert 200 in seen, seen
    if "parameters" in takes or "requestBody" in takes:
        bounded(given(operation.as_strategy(generation_mode=OTHERWISE))(ask))()


def test_document_needs_no_key_and_names_no_field_that_only_the_server_sets(world: World) -> None:
    found = httpx.get(f"{world.live.url}{PATH}").json()
    feedback = found["components"]["schemas"]["feedback"]
    assert {"interaction_id", "type"} <= set(feedback["required"])
    assert not {"reward", "source", "tenant"} & set(feedback["properties"])
    assert "arm" not in found["components"]["schemas"]["traced_interaction"]["properties"]
