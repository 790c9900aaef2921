"""Tokens of an identity provider: what opens the router, and what does not."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from cluster.errors import ConfigError
from cluster.settings import load_settings
from serve.jwt_keys import JwtKeys
from tests.serve.conftest import Live, live_router

ISSUER, AUDIENCE = "https://id.example/", "rayloop"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
CURVE = ec.generate_private_key(ec.SECP256R1())
MESSAGES = [{"role": "user", "content": "?"}]


def key_set(**keys: Any) -> str:
    documents = []
    for name, key in keys.items():
        algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
        documents.append(json.loads(algorithm.to_jwk(key.public_key())) | {"kid": name})
    return json.dumps({"keys": documents})


def token(key: Any = RSA, kid: str | None = "one", algorithm: str = "RS256", **changes: Any) -> str:
    claims = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "tenant": "default", "scope": "chat admin feedback",
        "exp": time.time() + 600,
    }  # fmt: skip
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid} if kid else None)


@pytest.fixture
def live_jwt(tmp_path: Path) -> Iterator[Live]:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(one=RSA, two=CURVE))
    yield from live_router(tmp_path / "home", serve={"jwt": _settings(file)})


def _settings(file: Path) -> dict[str, Any]:
    return {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": str(file), "refresh_s": 1}


def ask(live: Live, secret: str) -> Any:
    return live.client(secret).chat.completions.create(model="triage", messages=MESSAGES)


def wait_for_keys(live: Live, secret: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            ask(live, secret)
            return
        except openai.AuthenticationError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_token_opens_the_router_within_its_tenant_and_scopes(live_jwt: Live) -> None:
    wait_for_keys(live_jwt, token())
    assert ask(live_jwt, token(CURVE, "two", "ES256", sub="bob"))
    assert ask(live_jwt, live_jwt.secret)  # our own keys still do
    with pytest.raises(openai.NotFoundError):
        ask(live_jwt, token(tenant="other"))
    with pytest.raises(openai.PermissionDeniedError):  # claims more than tokens may have
        live_jwt.client(token()).fine_tuning.jobs.list()
    with pytest.raises(openai.PermissionDeniedError):
        ask(live_jwt, token(scope="feedback"))
    assert ask(live_jwt, token(scope=["chat"]))


WRONG: dict[str, Callable[[], str]] = {
    "another key": lambda: token(OTHER),
    "unknown key id": lambda: token(kid="three"),
    "no key id": lambda: token(kid=None),
    "expired": lambda: token(exp=time.time() - 600),
    "not yet": lambda: token(nbf=time.time() + 600),
    "for somebody else": lambda: token(aud="others"),
    "by somebody else": lambda: token(iss="https://evil.example/"),
    "without an end": lambda: token(exp=None),
    "without a subject": lambda: token(sub=None),
    "without a tenant": lambda: token(tenant=None),
    "with a tenant that is none": lambda: token(tenant="../default"),
    "unsigned": lambda: token(None, algorithm="none"),
    "symmetric": lambda: token("x" * 64, algorithm="HS256"),
    "another algorithm": lambda: token(algorithm="PS256"),
    "cut": lambda: token()[:-4],
    "changed": lambda: ".".join([token().split(".")[0], token(tenant="other").split(".")[1], token().split(".")[2]]),
    "huge": lambda: token(padding="x" * 10_000),
    "not one": lambda: "a.b.c",
}


@pytest.mark.parametrize("name", WRONG)
def test_token_that_is_wrong_opens_nothing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(one=RSA, two=CURVE))
    keys = JwtKeys(load_settings(home=tmp_path, serve={"jwt": _settings(file)})[0])
    keys.refresh()
    assert keys.find(token()) is not None
    assert keys.find(WRONG[name]()) is None


def test_withdrawn_key_opens_nothing_and_a_broken_set_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(one=RSA))
    keys = JwtKeys(load_settings(home=tmp_path, serve={"jwt": _settings(file)})[0])
    keys.refresh()
    mine = token()
    assert keys.find(mine) is not None
    file.write_text("<html>")
    keys.refresh()
    assert keys.find(mine) is not None
    file.write_text(key_set(two=CURVE))
    keys.refresh()
    assert keys.find(mine) is None


def test_token_ends_when_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(key_set(one=RSA))
    keys = JwtKeys(load_settings(home=tmp_path, serve={"jwt": _settings(file)})[0])
    keys.refresh()
    mine = token(exp=time.time() + 60)
    assert keys.find(mine) is not None
    monkeypatch.setattr("serve.jwt_keys.now_us", lambda: round((time.time() + 120) * 1e6))
    assert keys.find(mine) is None


def test_issuer_needs_an_audience_and_one_key_set(tmp_path: Path) -> None:
    for wrong in ({"issuer": ISSUER}, {"issuer": ISSUER, "audience": AUDIENCE}):
        with pytest.raises(ConfigError):
            load_settings(home=tmp_path, serve={"jwt": wrong})
