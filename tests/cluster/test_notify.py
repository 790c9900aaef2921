"""Notices by mail, to Slack, PagerDuty and a signed webhook; `rayloop notify test`."""

import json
from email import message_from_string, policy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.clock import from_iso
from cluster.errors import ConfigError
from cluster.notify import Notice, messenger
from cluster.settings import load_settings
from cluster.settings.outlets import AnyChannel
from cluster.webhook import DeliveryError, signature
from tests.services import Mailbox, Scripted, refused, scripted, smtp

NOTICE = Notice(
    "acme/rollout:r1:3",
    "page",
    "triage: rollout r1 is rolled back\nBcc: eve@evil.example",
    "error rate <!channel> & more",
    from_iso("2026-11-20T12:00:00Z"),
    {"rollout_id": "r1"},
)


def channel(**fields: Any) -> AnyChannel:
    return load_settings(notifications={"channels": {"ops": fields}})[0].notifications.channels["ops"]


def mail_channel(port: int, **more: Any) -> AnyChannel:
    fields = {"host": "127.0.0.1", "port": port, "security": "none", "sender": "rayloop@acme.example"}
    return channel(type="email", recipients=["ops@acme.example"], timeout_s=5, **(fields | more))


def test_slack_gets_text_that_cannot_call_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Scripted((200, b"ok", {}))
    with scripted(service) as url:
        monkeypatch.setenv("SLACK", f"{url}/services/T/B/x")
        messenger(channel(type="slack", url_env="SLACK")).send(NOTICE)
    path, body, _ = service.requests[0]
    assert path == "/services/T/B/x"
    text = json.loads(body)["text"]
    assert text.startswith("[page] *triage: rollout r1 is rolled back Bcc")
    assert "error rate &lt;!channel&gt; &amp; more" in text


def test_pagerduty_gets_one_incident_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "r0ut1ng")
    service = Scripted((202, b"{}", {}))
    with scripted(service) as url:
        sender = messenger(channel(type="pagerduty", routing_key_env="KEY", url=url))
        sender.send(NOTICE)
        sender.send(NOTICE)
    documents = [json.loads(body) for _, body, _ in service.requests]
    assert documents[0] == documents[1]
    assert (documents[0]["dedup_key"], documents[0]["event_action"]) == ("acme/rollout:r1:3", "trigger")
    assert documents[0]["routing_key"] == "r0ut1ng"
    payload = documents[0]["payload"]
    assert (payload["severity"], payload["timestamp"]) == ("critical", "2026-11-20T12:00:00.000000+00:00")
    assert payload["custom_details"]["rollout_id"] == "r1"


def test_webhook_gets_a_signed_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s" * 20)
    service = Scripted((200, b"", {}))
    with scripted(service) as url:
        messenger(channel(type="webhook", url=url, secret_env="SECRET")).send(NOTICE)
    _, body, headers = service.requests[0]
    document = json.loads(body)
    assert (document["id"], document["severity"], document["facts"]) == (NOTICE.notice_id, "page", {"rollout_id": "r1"})
    timestamp_s = int(headers["webhook-timestamp"])
    assert headers["webhook-signature"] == signature(b"s" * 20, headers["webhook-id"], timestamp_s, body)


def test_mail_has_one_subject_line_and_the_same_id_each_time() -> None:
    mailbox = Mailbox()
    with smtp(mailbox) as port:
        for _ in range(2):
            messenger(mail_channel(port)).send(NOTICE)
    first, second = (message_from_string(text, policy=policy.default) for text in mailbox.messages)
    assert first["Subject"] == "[page] triage: rollout r1 is rolled back Bcc: eve@evil.example"
    assert (first["Bcc"], first["To"]) == (None, "ops@acme.example")
    assert first["Message-ID"] == second["Message-ID"]
    assert "error rate <!channel> & more" in first.get_content()
    assert "rcpt to:<ops@acme.example>" in [command.lower() for command in mailbox.commands]


def test_refused_mail_is_a_failure_and_an_absent_server_unreachable() -> None:
    with smtp(Mailbox("550 no such user")) as port, pytest.raises(DeliveryError, match="550") as caught:
        messenger(mail_channel(port)).send(NOTICE)
    assert caught.value.how == "failed"
    with pytest.raises(DeliveryError) as unreachable:
        messenger(mail_channel(int(refused().rpartition(":")[2]))).send(NOTICE)
    assert unreachable.value.how == "unreachable"


def test_server_without_tls_gets_no_mail_where_tls_is_asked_for() -> None:
    mailbox = Mailbox()
    with smtp(mailbox) as port, pytest.raises(DeliveryError):
        messenger(mail_channel(port, security="starttls")).send(NOTICE)
    assert mailbox.messages == []


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"type": "slack"}, "url_env"),
        ({"type": "pigeon"}, "notifications.channels"),
        ({"type": "email", "host": "h", "sender": "a@b", "recipients": []}, "recipients"),
        ({"type": "email", "host": "h", "sender": "a@b\nBcc: c@d", "recipients": ["a@b"]}, "sender"),
        ({"type": "webhook", "url": "file:///etc/passwd"}, "url"),
        ({"type": "slack", "url_env": "X", "severities": ["loud"]}, "severities"),
    ],
)
def test_wrong_channel_is_refused_with_its_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        channel(**fields)


def test_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLACK", raising=False)
    with pytest.raises(ConfigError, match="SLACK=None is not set"):
        messenger(channel(type="slack", url_env="SLACK"))


def write_config(folder: Path, document: dict[str, Any]) -> str:
    file = folder / "rayloop.yaml"
    file.write_text(yaml.safe_dump({"home": str(folder / "home")} | document))
    return str(file)


def test_command_tests_every_channel_and_fails_when_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Scripted((200, b"", {}))
    with scripted(service) as url:
        monkeypatch.setenv("SLACK", url)
        channels = {"good": {"type": "slack", "url_env": "SLACK"}, "bad": {"type": "webhook", "url": refused()}}
        config = write_config(tmp_path, {"notifications": {"channels": channels}})
        with pytest.raises(SystemExit) as ended:
            main(["notify", "test", "--json", "--config", config])
        out, err = capsys.readouterr()
        assert ended.value.code == 1
        results = json.loads(out)["channels"]
        assert results["good"] is None
        assert "refused" in results["bad"].lower()
        assert "1 of 2 channels failed: bad" in err
        with pytest.raises(SystemExit) as well:
            main(["notify", "test", "good", "--severity", "ticket", "--config", config])
        assert well.value.code == 0
    assert [json.loads(body)["text"][:7] for _, body, _ in service.requests] == ["[page] ", "[ticket"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["test", "nobody"], "must be one of ops"), (["test", "--severity", "loud"], "must be page, ticket or success")],
)
def test_command_refuses_what_does_not_exist(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"notifications": {"channels": {"ops": {"type": "webhook", "url": refused()}}}})
    with pytest.raises(SystemExit) as ended:
        main(["notify", *arguments, "--config", config])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
