"""Remote engines: which addresses may be called."""

import pytest

from cluster.errors import ConfigError, UnavailableError
from serve.engines.http import RemoteEngine, check_address, is_public


def to(address: str):  # type: ignore[no-untyped-def]
    return lambda _host, _port: [address]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "::1", "fe80::1%eth0", "fd00::1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "224.0.0.1", "255.255.255.255", "fd00:ec2::254", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused_unless_named(address: str) -> None:
    with pytest.raises(ConfigError, match="is not a public address; name the host"):
        check_address("https://innocent.example/v1", resolver=to(address))
    assert check_address("http://innocent.example/v1", ["innocent.example"], resolver=to(address)) == [address]
    assert check_address("http://Innocent.example.:80/", ["innocent.example:80"], resolver=to(address)) == [address]
    with pytest.raises(ConfigError):
        check_address("https://innocent.example:8443/", ["innocent.example:80"], resolver=to(address))


def test_public_addresses_pass_and_one_private_among_them_spoils_all() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")
    assert check_address("https://api.example/v1", resolver=to("8.8.8.8")) == ["8.8.8.8"]
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1"):
        check_address("https://api.example", resolver=lambda _host, _port: ["8.8.8.8", "10.0.0.1"])


@pytest.mark.parametrize(
    "url",
    ["ftp://a.example", "file:///etc/passwd", "https://", "https://u:p@a.example", "https://a.example/?x=1",
     "https://a.example:99999", "http://a.example", "https://[::1", "//a.example"],
)  # fmt: skip
def test_urls_that_are_no_engine_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        check_address(url, resolver=to("8.8.8.8"))


def test_numbers_that_are_addresses_in_disguise_are_resolved_first() -> None:
    with pytest.raises(ConfigError, match=r"leads to 127\.0\.0\.1"):
        check_address("https://2130706433/")  # the C library reads it as 127.0.0.1


def test_unknown_host_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="is not known"):
        check_address("https://no-such-host.invalid/")


def test_key_comes_from_the_environment() -> None:
    engine = RemoteEngine("hosted", "https://api.example", "gpt", api_key_env="HOSTED_KEY")
    assert engine.api_key({"HOSTED_KEY": "s"}) == "s"
    with pytest.raises(ConfigError, match="HOSTED_KEY"):
        engine.api_key({})
    assert RemoteEngine("open", "https://api.example", "gpt").api_key({}) is None
