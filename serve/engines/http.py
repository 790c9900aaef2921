"""Engines elsewhere: any OpenAI-compatible endpoint, described and checked before anything is sent to it.

The addresses come from a configuration that more people may write than may reach the cluster's network,
so private, loopback, link-local and metadata addresses are refused unless their host is named in
`engine.allowed_hosts`.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ConfigError, UnavailableError

Resolve = Callable[[str, int], list[str]]
REMEDY = "name the host in `engine.allowed_hosts` if you trust it"


@dataclass(frozen=True, slots=True)
class RemoteEngine:
    """One remote endpoint."""

    name: str
    base_url: str
    """Address in front of `/v1/chat/completions`."""
    model: str
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the bearer key."""
    connect_timeout_s: float = 2.0
    timeout_s: float = 120.0

    def api_key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The bearer key; `None` when the endpoint wants none.

        Raises:
            ConfigError: a key is asked for and the variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = environment.get(self.api_key_env)
        if not key:
            field = f"engine {self.name}.api_key_env"
            raise ConfigError(field, self.api_key_env, "is not set in the environment", "export it")
        return key

    def check(self, allowed: Collection[str]) -> list[str]:
        """The addresses it may be reached at (see `check_address`)."""
        return check_address(self.base_url, allowed)


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host.

    Raises:
        UnavailableError: the name is not known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"the host {host!r} of a remote engine is not known ({error})") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_address(url: str, allowed: Collection[str] = (), *, resolver: Resolve = resolve) -> list[str]:
    """Check that a URL may be called; returns its addresses, to which the caller should connect.

    Connecting to the returned addresses, instead of resolving again, is what defeats a name that points
    elsewhere the second time. `allowed` holds hosts, as `host` or `host:port`, that may be private.

    Raises:
        ConfigError: not http(s), credentials in it, or an address that is not public and not allowed.
        UnavailableError: the host is not known.
    """
    parts, host, port = _parse(url)
    addresses = resolver(host, port)
    named = {entry.lower() for entry in allowed}
    if host in named or f"{host}:{port}" in named:
        return addresses
    if parts.scheme != "https":
        raise ConfigError("base_url", url, "must start with https:// for a public host", REMEDY)
    for address in addresses:
        if not is_public(address):
            raise ConfigError("base_url", url, f"leads to {address}, which is not a public address", REMEDY)
    return addresses


def _parse(url: str) -> tuple[Any, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError("base_url", url, f"is not a URL ({error})", "write https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url", url, "must start with http:// or https://", "write https://host/path")
    if parts.username or parts.password:
        raise ConfigError("base_url", parts.hostname, "must not carry credentials", "use `api_key_env`")
    if parts.query or parts.fragment:
        raise ConfigError("base_url", url, "must not carry a query or a fragment", "write https://host/path")
    return parts, parts.hostname.rstrip(".").lower(), port


def is_public(address: str) -> bool:
    """True for an address of the public internet; an IPv6 form of an IPv4 address counts as that one."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return bool(ip.is_global) and not ip.is_multicast
