import orjson
import pytest

from cluster.settings.curation import ScrubSettings
from data.recognisers import find, iban_valid, luhn
from data.scrub import possibly_unsafe, scrub
from data.scrub_text import Placeholders, scrub_text, suspicion
from tests.data.rows import rows, signal

JWT = ".".join(  # the example of jwt.io
    [
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9",
        "eyJzdWIiOiIxMjM0NTY3ODkwIn0",
        "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    ]
)
SYNTHETIC = "a1B2c3D4" * 4  # stands for the random part of a key
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("write to ada.lovelace+x@mail.example.co.uk now", "EMAIL", "ada.lovelace+x@mail.example.co.uk"),
        ("call +44 20 7946 0958 today", "PHONE", "+44 20 7946 0958"),
        ("(212) 555-0187 ext. 12", "PHONE", "(212) 555-0187 ext. 12"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN", "DE89 3704 0044 0532 0130 00"),
        ("card 4111 1111 1111 1111 please", "CARD", "4111 1111 1111 1111"),
        ("from 192.168.12.7:8080", "IP", "192.168.12.7"),
        ("host 2001:db8::8a2e:370:7334 up", "IP", "2001:db8::8a2e:370:7334"),
        ("ssn 078-05-1120", "SSN", "078-05-1120"),
        ("key AKIAIOSFODNN7EXAMPLE here", "API_KEY", "AKIAIOSFODNN7EXAMPLE"),
        (f"sk-ant-api03-{SYNTHETIC}", "API_KEY", f"sk-ant-api03-{SYNTHETIC}"),
        (f"use ghp_{SYNTHETIC} now", "API_KEY", f"ghp_{SYNTHETIC}"),
        (f"token {JWT}", "JWT", JWT),
        (f"here:\n{KEY}\nok", "PRIVATE_KEY", KEY),
        ("psql postgres://bob:hunter2@db:5432/x", "CREDENTIAL_URL", "postgres://bob:hunter2@db:5432/x"),
        ("password = s3cr3t-Pa55", "SECRET", "s3cr3t-Pa55"),
        ("see https://intranet.acme.se/a?b", "DOMAIN", "intranet.acme.se"),
        ("at www.acme.pl", "DOMAIN", "www.acme.pl"),
    ],
)  # fmt: skip
def test_each_kind_is_found_exactly(text: str, kind: str, value: str) -> None:
    assert [(s.kind, s.value) for s in find(text)] == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # wrong check digit
        "GB00 1234 5678 9012 3456 78",  # wrong check digits
        "version 1.2.3, build 20240131, at 12:30:45",
        "12 + 30 - 5 = 37 and 1000 - 200 - 300 = 500",
        "he paid $1,250,000.00 or 1 250 000 in all",
        "on 2024-01-31 and 31.01.2024",
        "std::vector and a::b",
        "open main.py, run.sh and lib.rs",
        "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
        "password: required",
        "service: billing p99: 1500 region: eu-west-1",
    ],
)
def test_clean_text_is_left_alone(text: str) -> None:
    assert find(text) == []


def test_check_digits() -> None:
    assert luhn("79927398713") and not luhn("79927398710")  # the usual worked example
    assert iban_valid("GB82 WEST 1234 5698 7654 32")  # ISO 13616's own example
    assert not iban_valid("GB82 WEST 1234 5698 7654 33")


def test_a_value_keeps_its_placeholder_through_a_conversation() -> None:
    known = Placeholders()
    assert scrub_text("ann@x.org or bob@x.org", known) == "<EMAIL_1> or <EMAIL_2>"
    assert scrub_text("I wrote to Bob@x.org", known) == "I wrote to <EMAIL_2>"
    assert scrub_text("<EMAIL_1> or <EMAIL_2>", known) == "<EMAIL_1> or <EMAIL_2>"


def test_scrub_numbers_from_question_to_answer_and_correction() -> None:
    table = rows(
        {
            "messages": [{"role": "user", "content": "mail ann@x.org"}],
            "response": {"role": "assistant", "content": "Mailed ann@x.org, cc bob@x.org."},
            "signals": [{"type": "correction", "text": "Only bob@x.org.", "user": "ada", "reward": -0.5}],
        },
        {"interaction_id": "clean"},
    )
    clean, dropped = scrub(table, ScrubSettings())
    assert orjson.loads(clean["response"][0].as_py())["content"] == "Mailed <EMAIL_1>, cc <EMAIL_2>."
    assert orjson.loads(clean["signals"][0].as_py())[0]["text"] == "Only <EMAIL_2>."
    assert clean["scrubbed"].to_pylist() == ['{"EMAIL":2}', "{}"]
    assert clean["messages"][1] == table["messages"][1] and not dropped


def test_tool_arguments_are_scrubbed_inside_their_json_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": '{"to": "ann@x.org"}'}}
    table = rows({"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]})
    clean, _ = scrub(table, ScrubSettings())
    assert '{\\"to\\": \\"<EMAIL_1>\\"}' in clean["messages"][0].as_py()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("the value is qT7vR2mZ9xK4pL8wN3bY6cJ1hF5dS0gA", "possible secret"),
        ("mail ann (at) example (dot) org", "spelled-out address"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE", "part of a private key"),
    ],
)
def test_rows_that_still_look_unsafe_go_to_quarantine(answer: str, reason: str) -> None:
    kept, dropped = scrub(rows({"response": {"role": "assistant", "content": answer}}), ScrubSettings())
    assert len(kept) == 0 and dropped == {f"quarantine: {reason}": 1}


def test_hashes_paths_and_names_are_not_suspicious() -> None:
    settings = ScrubSettings()
    for text in (
        "9fceb02d0ae598e95dc970b74767f19372d61af8a1b2c3d4",
        "src/components/navigation/TopLevelMenuItem2/index_file_for_tests",
        "a_very_long_snake_case_identifier_with_many_words",
        "550e8400-e29b-41d4-a716-446655440000",
    ):
        assert suspicion(text, settings) is None


def test_times_and_pseudonyms_of_signals_are_nothing_to_look_at() -> None:
    user = "63405be194f0ffbe68618f58876cb66c"
    plain = signal("thumbs_up", 1.0, user=user, at_us=1_790_000_000_000_000)
    quoted = plain | {"text": f'"at_us":4111111111111111, "user":"ada@example.org" {user}'}
    table = rows({"signals": [plain]}, {"signals": [quoted]}, {"signals": [plain], "labels": [{"reviewer": user}]})
    assert list(possibly_unsafe(table, 32)) == [1]
    said = scrub(table, ScrubSettings())[0]["signals"].to_pylist()
    assert "4111111111111111" not in said[1] and "ada@" not in said[1]
    assert said[0] == table["signals"][0].as_py()
