"""The OpenAPI document is true: whatever Schemathesis makes of it, every answer is one it promises."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.intake_http import KINDS
from serve.labels_http import LABELS, QUEUE
from serve.openapi import PATH
from tests.serve.conftest import Live

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


def document(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{live.url}{PATH}").json()
    return found


@pytest.mark.parametrize("mode", MODES, ids=["as described", "not as described"])
@pytest.mark.parametrize("path", [*KINDS, LABELS])
def test_no_body_that_schemathesis_makes_gives_a_5xx(live: Live, path: str, mode: schemathesis.GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(document(live))[path]["POST"]
    headers = {"authorization": f"Bearer {live.secret}"}
    seen = set()

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def hold(case: Any) -> None:
        response = case.call(base_url=live.url, headers=headers)
        seen.add(response.status_code)
        case.validate_response(response, checks=CHECKS, headers=headers)

    hold()
    assert 200 in seen or mode is MODES[1]


@pytest.mark.parametrize("mode", MODES, ids=["as described", "not as described"])
def test_no_query_that_schemathesis_makes_gives_a_5xx(live: Live, mode: schemathesis.GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(document(live))[QUEUE]["GET"]
    headers = {"authorization": f"Bearer {live.secret}"}

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def hold(case: Any) -> None:
        response = case.call(base_url=live.url, headers=headers)
        case.validate_response(response, checks=CHECKS, headers=headers)

    hold()


def test_document_needs_no_key_and_names_no_field_that_only_the_server_sets(live: Live) -> None:
    found = document(live)
    assert set(found["paths"]) == {*KINDS, LABELS, QUEUE}
    feedback = found["components"]["schemas"]["feedback"]
    assert {"interaction_id", "type"} <= set(feedback["required"])
    assert not {"reward", "source", "tenant"} & set(feedback["properties"])
    assert "arm" not in found["components"]["schemas"]["traced_interaction"]["properties"]
