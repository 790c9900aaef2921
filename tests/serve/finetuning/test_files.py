"""`/v1/files` through the official client, on SQLite and PostgreSQL."""

import threading

import httpx
import openai
import pytest

from tests.serve.finetuning.conftest import Api, chat_rows, lines, pair_rows


def test_file_is_uploaded_listed_read_back_and_deleted(api: Api) -> None:
    files = api.client.files
    content = lines(chat_rows(12)) + '{"messages": [{"role": "user", "content": "ä"}, '.encode()
    content += '{"role": "assistant", "content": "✓"}]}\n'.encode()
    made = files.create(file=('my"odd" näme.jsonl', content), purpose="fine-tune")
    assert (made.bytes, made.purpose, made.status) == (len(content), "fine-tune", "processed")
    assert made.filename == 'my"odd" näme.jsonl'
    assert files.retrieve(made.id) == made
    assert files.content(made.id).content == content
    assert [file.id for file in files.list()] == [made.id]
    assert files.delete(made.id).deleted
    assert list(files.list()) == []
    with pytest.raises(openai.NotFoundError):
        files.content(made.id)
    assert list((api.settings.files_root / "default").iterdir()) == []


def test_list_pages_in_both_orders_and_by_purpose(api: Api) -> None:
    made = [api.upload(chat_rows(10, seed)) for seed in range(5)]
    assert [file.id for file in api.client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in api.client.files.list(limit=2, order="asc")] == made
    assert list(api.client.files.list(purpose="fine-tune-results")) == []
    with pytest.raises(openai.BadRequestError, match="limit must be a whole number"):
        api.client.files.list(limit=0)
    with pytest.raises(openai.NotFoundError):
        api.client.files.list(after="file-none")


def test_tenants_and_scopes_are_kept_apart(api: Api) -> None:
    mine = api.upload(chat_rows(10))
    other = api.client_of("other")
    assert list(other.files.list()) == []
    for refused in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            refused(mine)
    with pytest.raises(openai.PermissionDeniedError, match="scope train"):
        api.client_of("default", ("chat",)).files.list()
    with pytest.raises(openai.AuthenticationError):
        api.client.with_options(api_key="rl-wrong").files.list()
    assert api.client.files.retrieve(mine).id == mine


USER = {"role": "user", "content": "q"}
BAD_LINES = {
    "no JSON": (b"{broken", r"line 11: line=.* is not valid JSON"),
    "not an object": ([1], r"line 11: line=\[1\] must be a JSON object"),
    "other format": (pair_rows(1)[0], r"line 11: format='preference' has the format"),
    "no answer": ({"messages": [USER]}, r"line 11: format='item' has the format"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\.0\.role='robot' must be one of"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]},
        r"messages\.0\.content\.0=.* must be a text part",
    ),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, r"messages\.1\.content=None must be text"),
    "unknown field": ({"messages": [USER], "extra": 1, "x": 2}, r"line 11: format='item'"),
    "weight": ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 2}]}, r"weight=2 must be 0 or 1"),
    "nothing learned": (
        {"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]},
        "leaves no assistant message",
    ),
    "broken call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        r"tool_calls\.0\.function\.arguments='\{' must be a JSON object",
    ),
    "equal pair": (
        {"input": {"messages": [USER]}} | {key: [USER] for key in ("preferred_output", "non_preferred_output")},
        r"line 11: preferred_output=\['user'\] must be one assistant message",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_refused_with_its_number_and_reason(refusing: Api, case: str) -> None:
    row, message = BAD_LINES[case]
    bad = row + b"\n" if isinstance(row, bytes) else lines([row])
    content = lines(chat_rows(10)) + bad + lines(chat_rows(1))
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        refusing.client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    assert caught.value.param == "file.line.11" and caught.value.code == "invalid_file"
    assert list(refusing.client.files.list()) == []
    assert list((refusing.settings.files_root / "default").iterdir()) == []


def test_several_bad_lines_are_named_together(refusing: Api) -> None:
    rows = [*chat_rows(10), {"messages": []}, *chat_rows(1), {"messages": 5}]
    with pytest.raises(openai.BadRequestError, match=r"line 11: messages=\[\].*\(lines 13 too\)"):
        refusing.upload(rows)


def test_limits_of_files_are_answered_in_openai_shape(api: Api) -> None:
    with pytest.raises(openai.BadRequestError, match="has 3 lines, fewer than 10"):
        api.upload(chat_rows(3))
    with pytest.raises(openai.APIStatusError, match="longer than") as caught:
        api.client.files.create(file=("big.jsonl", b"x" * 2_000_000), purpose="fine-tune")
    assert caught.value.status_code == 413
    for purpose, field in (("batch", "purpose"), ("nonsense", "purpose")):
        with pytest.raises(openai.BadRequestError, match="purpose must be fine-tune") as refused:
            api.client.files.create(file=("x.jsonl", lines(chat_rows(10))), purpose=purpose)  # type: ignore[arg-type]
        assert refused.value.param == field
    for seed in range(6):
        api.upload(chat_rows(10, seed))
    with pytest.raises(openai.RateLimitError, match="keeps 6 files, as many as it may"):
        api.upload(chat_rows(10, 9))


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"x", 415),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b\r\ncontent-disposition: form-data\r\n\r\nv\r\n--b--", 400),
        ("multipart/form-data; boundary=b", b"--b--", 400),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nv', 400),
    ],
)
def test_broken_forms_are_refused(refusing: Api, content_type: str, body: bytes, status: int) -> None:
    headers = {"authorization": f"Bearer {refusing.client.api_key}", "content-type": content_type}
    answer = httpx.post(f"{refusing.url}/v1/files", content=body, headers=headers)
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_uploads_at_the_same_time_each_keep_their_own_bytes(api: Api) -> None:
    sent = {seed: lines(chat_rows(10, seed)) for seed in range(4)}
    made: dict[int, str] = {}

    def upload(seed: int) -> None:
        made[seed] = api.client.files.create(file=(f"{seed}.jsonl", sent[seed]), purpose="fine-tune").id

    threads = [threading.Thread(target=upload, args=(seed,)) for seed in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: api.client.files.content(made[seed]).content for seed in sent} == sent


def test_names_that_no_database_can_look_for_are_refused(api: Api) -> None:
    headers = {"authorization": f"Bearer {api.client.api_key}"}
    for method, path, status in [
        ("GET", "/v1/files/%00", 404),
        ("GET", "/v1/files/%2500", 404),
        ("DELETE", "/v1/files/a%00b", 404),
        ("GET", "/v1/files?after=%00", 400),
        ("GET", "/v1/files?purpose=%00", 400),
        ("GET", "/v1/fine_tuning/jobs/%00", 404),
        ("POST", "/v1/fine_tuning/jobs/%00/cancel", 404),
        ("GET", "/v1/fine_tuning/jobs?after=%00", 400),
        ("GET", "/v1/models/%00", 404),
    ]:
        assert httpx.request(method, f"{api.url}{path}", headers=headers).status_code == status, path
    asked = {"model": "toy", "training_file": "a\0b"}
    refused = httpx.post(f"{api.url}/v1/fine_tuning/jobs", json=asked, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "training_file")
    for wrong in ({"type": []}, {"type": {}}, []):
        document = {"model": "toy", "training_file": "f", "method": wrong}
        refused = httpx.post(f"{api.url}/v1/fine_tuning/jobs", json=document, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "method.type")
