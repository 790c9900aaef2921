"""Tools and grader, where they answer and where they do not."""

import asyncio
import json

import pytest

from cluster.errors import InputError
from cluster.settings import Settings
from serve.graders import GraderApi
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.sender import SenderLimits
from tests.serve.client.conftest import ASK, Make, at, warnings
from tests.serve.conftest import Live
from tests.serve.upstream import Server
from tests.services import Scripted, dripping, hanging, refused, scripted


def test_grade_comes_from_the_real_grader(live: Live, make: Make, settings: Settings) -> None:
    secret = create_key(live.database, "judge", "default", "default", ["grade"])
    with Server(GraderApi(live.settings.grader, KnownKeys(live.settings, 0.1)), "on") as url:
        client = make(live.url, api_key=secret, grader_url=url, call_timeout_s=20)
        label = {"type": "dataset_label", "name": "label"}
        grade = client.grade(label, "1", {"reference": "1"})
        assert grade is not None
        assert grade.reward == 1.0
        abstained = asyncio.run(client.grade_async(label, "1"))
        assert abstained is not None
        assert abstained.reward is None
        with pytest.raises(InputError, match=r"call=400|type="):
            client.grade({"type": "unheard of"}, "1")


def test_tool_comes_from_the_server_and_is_noted(make: Make) -> None:
    service = Scripted((200, b'{"result": [1, 2]}', {}))
    with scripted(service) as url:
        client = make(refused(), tools_url=url, api_key="rl-1")
        with client.predicting("a", messages=ASK) as prediction:
            assert client.call_tool("my search", {"q": "x"}, local=lambda q: "local") == [1, 2]
        path, body, headers = service.requests[0]
    sent = json.loads(body)
    assert (path, sent["arguments"]) == ("/v1/tools/my%20search", {"q": "x"})
    assert sent["call_id"].startswith("call_")  # a retry under it writes nothing twice
    assert headers["authorization"] == "Bearer rl-1"
    assert json.loads(prediction._calls[1]["content"]) == [1, 2]


@pytest.mark.parametrize("kind", ["refused", "hanging", "dripping", "failing"])
def test_dead_tools_and_grader_mean_the_normal_flow(kind: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    places = {"refused": lambda: at(refused()), "hanging": hanging, "dripping": dripping}
    with places[kind]() if kind in places else scripted(Scripted((500, b"", {}))) as url:
        client = make(refused(), tools_url=url, grader_url=url, call_timeout_s=0.1, limits=SenderLimits(linger_s=60))
        for _ in range(6):
            assert client.call_tool("add", {"a": 1}, local=lambda a: a + 1) == 2
        assert client.grade({"type": "string_check"}, "x") is None
    assert client.stats()["unanswered_calls"] == 7
    assert len(warnings(caplog)) == 2  # one for each of the two services


def test_open_breaker_asks_nobody(make: Make) -> None:
    service = Scripted((500, b"", {}))
    with scripted(service) as url:
        client = make(refused(), tools_url=url, limits=SenderLimits(consecutive=3, half_open_s=60, linger_s=60))
        for _ in range(10):
            assert client.call_tool("t", {}, local=lambda: 5) == 5
    assert len(service.requests) == 3


def test_refused_arguments_are_the_callers_error(make: Make) -> None:
    refusal = b'{"error": {"message": "q is missing", "param": "q"}}'
    with scripted(Scripted((400, refusal, {}))) as url:
        client = make(refused(), tools_url=url, limits=SenderLimits(linger_s=60))
        with pytest.raises(InputError, match="q=400 q is missing"):
            client.call_tool("t", {}, local=lambda: 5)
