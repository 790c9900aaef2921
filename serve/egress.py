"""Which addresses the router may call: engines elsewhere, checked before a single byte goes there.

Addresses come from a configuration that more people may write than may reach the cluster's network, so
private, loopback, link-local and metadata addresses are refused unless their host is named in
`serve.allowed_hosts`. A name is resolved once per connection and the connection goes to the address that was
checked, so a name that points elsewhere the second time gains nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cluster.errors import ConfigError
from cluster.settings.serving import EngineEndpoint

PROTOCOL_V4 = ipaddress.ip_network("192.0.0.0/24")
"""Holds a cloud's metadata service; `is_global` of Python 3.11 knows only its first eight addresses."""
UNICAST_V6 = ipaddress.ip_network("2000::/3")
"""Every address of the public internet lies in it (RFC 4291, IANA's registry)."""
REMEDY = "name the host in `serve.allowed_hosts` if you trust it"


class Destination:
    """One checked URL: where it leads is decided again, and checked again, at every connection.

    `allowed` holds hosts, as `host` or `host:port`, that may be private or without TLS; `None` trusts the URL,
    which is then our own.

    Raises:
        ConfigError: not http(s), credentials, a query or a fragment in it, plain http to a host that is not
            named, or an address that is written out and not public.
    """

    def __init__(self, url: str, allowed: Collection[str] | None) -> None:
        self.parts = _split(url)
        self.host = str(self.parts.hostname).rstrip(".").lower()
        self.port = self.parts.port or (443 if self.parts.scheme == "https" else 80)
        self.is_tls = self.parts.scheme == "https"
        named = {entry.lower() for entry in allowed or ()}
        self.is_trusted = allowed is None or self.host in named or f"{self.host}:{self.port}" in named
        if self.is_trusted:
            return
        if not self.is_tls:
            raise ConfigError("base_url", url, "must start with https:// for a host that is not named", REMEDY)
        if _is_literal(self.host) and not is_public(self.host):
            raise ConfigError("base_url", url, "is not a public address", REMEDY)

    async def addresses(self) -> list[str]:
        """What the host resolves to now, each address fit to be connected to.

        Raises:
            OSError: the name is not known.
            ForbiddenAddressError: one of its addresses is not public, and the host is not named.
        """
        if _is_literal(self.host):  # checked when the URL was; needs none of the threads that names need
            return [self.host]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self.is_trusted:
            for address in addresses:
                if not is_public(address):
                    raise ForbiddenAddressError(f"{self.host} leads to {address}, which is not a public address")
        return addresses


def check_endpoints(endpoints: Mapping[str, EngineEndpoint], allowed: Collection[str]) -> None:
    """Check what can be checked of engines' addresses without asking anybody.

    Raises:
        ConfigError: the first that may not be called.
    """
    for name, endpoint in endpoints.items():
        if endpoint.base_url is not None:
            try:
                Destination(endpoint.base_url, allowed)
            except ConfigError as error:
                raise ConfigError(f"engines.{name}.{error.field}", error.value, error.rule, error.remedy) from None


class ForbiddenAddressError(Exception):
    """A host that leads where the router may not go."""


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError("base_url", url, f"is not a URL ({error})", "write https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url", url, "must start with http:// or https://", "write https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("base_url", parts.hostname, "must not carry credentials", "use `api_key_env`")
    if parts.query or parts.fragment or not url.isascii() or any(c in url for c in " \t\r\n\\"):
        rule = "must be plain ASCII without a query, a fragment, spaces or backslashes"
        raise ConfigError("base_url", url, rule, "write https://host/path")
    return parts


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """True for an address of the public internet; an IPv6 form of an IPv4 address counts as that one."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and int(ip) >> 32 == 0:  # IPv4-compatible, RFC 4291
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    assigned = UNICAST_V6 if ip.version == 6 else PROTOCOL_V4
    return bool(ip.is_global) and not ip.is_multicast and (ip in assigned) == (ip.version == 6)
