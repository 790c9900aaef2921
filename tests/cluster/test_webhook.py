"""Signatures and verdicts of a delivery."""

import pytest

from cluster.errors import ConfigError
from cluster.webhook import DeliveryError, Webhook, secret_bytes, signature
from tests.services import Scripted, hanging, refused, scripted


def test_signature_is_that_of_the_published_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector of the reference implementations: https://docs.svix.com/receiving/verifying-payloads/how"""
    monkeypatch.setenv("SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = signature(secret_bytes("SECRET"), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("value", "rule"),
    [(None, "is not set"), ("short", "fewer than 16"), ("whsec_%%%", "is not base64")],
)
def test_unusable_secret_is_named_and_not_shown(value: str | None, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("SECRET", value)
    with pytest.raises(ConfigError, match=f"^SECRET=.*{rule}") as caught:
        secret_bytes("SECRET")
    assert value is None or value not in str(caught.value)


def test_delivery_is_signed_and_carries_its_id() -> None:
    service = Scripted((204, b"", {}))
    with scripted(service) as url:
        Webhook(f"{url}/hook", b"k" * 16, 5).send("acme/e1", b"{}")
    path, body, headers = service.requests[0]
    assert (path, body, headers["webhook-id"], headers["idempotency-key"]) == ("/hook", b"{}", "acme/e1", "acme/e1")
    expected = signature(b"k" * 16, "acme/e1", int(headers["webhook-timestamp"]), body)
    assert headers["webhook-signature"] == expected


@pytest.mark.parametrize(
    ("status", "how"),
    [(400, "refused"), (413, "refused"), (422, "refused"), (401, "failed"), (404, "failed"), (500, "failed"),
     (429, "failed"), (302, "failed")],
)  # fmt: skip
def test_answer_that_is_no_success_says_what_to_do(status: int, how: str) -> None:
    headers = {"retry-after": "7", "location": "http://127.0.0.1:1/"}
    with scripted(Scripted((status, b"why", headers))) as url, pytest.raises(DeliveryError) as caught:
        Webhook(url, None, 5).send("i", b"{}")
    assert (caught.value.how, caught.value.retry_after_s) == (how, 7.0)
    assert str(caught.value) == f"status {status}: why"


def test_nobody_there_is_unreachable() -> None:
    with pytest.raises(DeliveryError) as caught:
        Webhook(refused(), None, 5).send("i", b"{}")
    assert caught.value.how == "unreachable"


def test_silence_is_unreachable() -> None:
    with hanging() as url, pytest.raises(DeliveryError) as caught:
        Webhook(url, None, 0.1).send("i", b"{}")
    assert caught.value.how == "unreachable"
