"""Engines elsewhere: which addresses may be called. No connection is made to any of the others."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import ConfigError
from serve.egress import Destination, check_endpoints, is_public
from serve.proxy import Limits, Upstream, UpstreamError
from serve.snapshot import Watcher
from tests.serve.conftest import Live
from tests.serve.upstream import Engine, Server

LITERALS = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1",
    "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]",
    "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::]", "[::ffff:10.0.0.1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
]  # fmt: skip
"""Written out; private, loopback, link-local, metadata, multicast or reserved, in IPv4 or an IPv6 form of it."""
DISGUISED = [
    "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0x0",
    "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.16689662", "localhost", "LOCALHOST", "localhost.",
    "127.0.0.1.",
]  # fmt: skip
"""What the C library reads as such an address."""
NAMES = {
    "metadata.google.internal": ["169.254.169.254"],
    "rebind.attacker.example": ["10.0.0.5"],
    "one-private-of-two.example": ["8.8.8.8", "192.168.1.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "linklocal.example": ["fe80::1%eth0"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "kubernetes.default.svc": ["10.96.0.1"],
}
"""Names by what they resolve to."""
SYNTAX = [
    "ftp://a.example", "file:///etc/passwd", "gopher://a.example/_x", "https://", "//a.example", "a.example",
    "http://8.8.8.8", "http://a.example", "https://u:p@a.example", "https://u@a.example", "https://a.example@127.0.0.1/",
    "https://a.example/?x=1", "https://a.example/#x", "https://a.example:99999", "https://[::1", "https://a.example\\@b",
    "https://a.example/ x", "https://a.example/\r\nhost: b", "https://ⓛocalhost/", "https://\uff11\uff12\uff17.0.0.1/",
]  # fmt: skip


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every connection any event loop is asked for, none of which is made; names resolve as in `NAMES`."""
    made: list[Any] = []

    async def connect(_loop: Any, _factory: Any, host: str, port: int, **_: Any) -> Any:
        made.append((host, port))
        raise ConnectionRefusedError

    real = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host in NAMES:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in NAMES[host]]
        return real(host, port, *arguments, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield made


def post(url: str, *allowed: str) -> None:
    asyncio.run(Upstream(url, Limits(connect_attempts=1), allowed=allowed).post("/v1/chat/completions", b"{}"))


@pytest.mark.parametrize("host", [*LITERALS, *DISGUISED, *NAMES])
def test_no_connection_to_an_address_that_is_not_public(host: str, connections: list[Any]) -> None:
    with pytest.raises((ConfigError, UpstreamError)) as caught:
        post(f"https://{host}/v1")
    assert connections == []
    if isinstance(caught.value, UpstreamError):
        assert caught.value.code in ("engine_address_refused", "engine_unavailable")
        assert host not in caught.value.message  # a client learns nothing of the network behind


def test_there_are_sixty_of_them() -> None:
    assert len({*LITERALS, *DISGUISED, *NAMES}) >= 60


@pytest.mark.parametrize("url", SYNTAX)
def test_urls_that_are_no_engine_are_refused(url: str, connections: list[Any]) -> None:
    with pytest.raises(ConfigError):
        post(url)
    assert connections == []


def test_a_host_that_is_named_may_be_private_and_without_tls(connections: list[Any]) -> None:
    for url, name in [
        ("http://10.0.0.1:8000/v1", "10.0.0.1"),
        ("http://Metadata.Google.Internal./x", "metadata.google.internal"),
        ("http://rebind.attacker.example:81", "rebind.attacker.example:81"),
    ]:
        with pytest.raises(UpstreamError, match="cannot connect"):
            post(url, name)
    assert connections == [("10.0.0.1", 8000), ("169.254.169.254", 80), ("10.0.0.5", 81)]
    with pytest.raises(ConfigError, match="https"):
        post("http://rebind.attacker.example:82", "rebind.attacker.example:81")


def test_the_connection_goes_to_the_address_that_was_checked(
    connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers with a public address first and a private one after gains nothing."""
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, *_, **__: [(2, 1, 6, "", (a, port)) for a in next(answers)]
    )
    with pytest.raises(UpstreamError, match="cannot connect"):
        post("https://rebinding.example/")
    assert connections == [("8.8.8.8", 443)]
    with pytest.raises(UpstreamError, match="not allowed"):
        post("https://rebinding.example/")
    assert connections == [("8.8.8.8", 443)]


def test_public_addresses_pass() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")
    assert is_public("::ffff:8.8.8.8")
    Destination("https://8.8.8.8/v1", ())


def test_a_redirect_is_an_error_and_is_not_followed() -> None:
    inside = Engine()

    async def redirect(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"location", inside_url.encode() + b"/v1/chat/completions"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 307, "headers": head})
        await send({"type": "http.response.body", "body": b""})

    with Server(inside) as inside_url, Server(redirect) as url:
        upstream = Upstream(url, Limits(), allowed=["127.0.0.1"])

        async def ask() -> int:
            reply = await upstream.post("/v1/chat/completions", b"{}")
            await reply.read()
            upstream.close()
            return reply.status

        assert asyncio.run(ask()) == 307
    assert inside.requests == []


def test_config_with_a_private_engine_is_refused_with_its_name(live: Live) -> None:
    before = dict(live.app.watcher.endpoints)
    live.app.reconfigure({"engines": {"theirs": {"base_url": "https://169.254.169.254/"}}})
    live.app.watcher.refresh()
    assert "engines.theirs.base_url" in str(live.app.watcher.rejection)
    assert live.app.watcher.endpoints == before
    with pytest.raises(ConfigError, match=r"engines\.local\.base_url"):
        check_endpoints(Watcher(live.settings).endpoints | {"local": _endpoint("http://10.0.0.1")}, ())


def _endpoint(url: str) -> Any:
    from cluster.settings.serving import EngineEndpoint

    return EngineEndpoint(base_url=url)
