"""Tokens of an identity provider (JWT, RFC 7519) as keys of the router.

The provider's key set is read by a thread of its own and kept while the provider is away. A token is verified
once and remembered until it ends: signature, issuer, audience, times, and the claims that say whose it is. What it
may do is bounded by `serve.jwt.scopes`, whatever it claims.
"""

import hashlib
import json
import logging
import re
import threading
import time
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any

from cluster.clock import SECOND_US, now_us
from cluster.settings import Settings
from serve.keys import Key

log = logging.getLogger(__name__)

REMEMBERED = 10_000
EARLY_S = 10.0
"""A token by a key that is not known has the set read again, at most this often: providers rotate their keys."""
FETCH_TIMEOUT_S = 5.0
MAX_KEY_SET_BYTES = 1_000_000
MAX_TOKEN_CHARACTERS = 8_192
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class JwtKeys(threading.Thread):
    """Verifies tokens; as a thread, reads the provider's keys."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="jwt-keys", daemon=True)
        self._settings, self._jwt = settings, settings.serve.jwt
        self._keys: dict[str | None, Any] = {}
        self._known: OrderedDict[str, Key] = OrderedDict()
        self._wake, self._stopping = threading.Event(), False
        self._read_at = float("-inf")

    @property
    def is_on(self) -> bool:
        """Tokens are taken."""
        return self._jwt.issuer is not None

    def run(self) -> None:
        """Read the key set until stopped."""
        while not self._stopping:
            self.refresh()
            self._wake.wait(self._jwt.refresh_s)
            self._wake.clear()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()

    def refresh(self) -> None:
        """Read the key set; a failure keeps the last one."""
        self._read_at = time.monotonic()
        try:
            self._keys = _parsed(self._document())
        except Exception as error:  # this thread is the only source of keys: it must outlive any answer
            log.error("the key set of %s cannot be read (%s); the last one stays", self._jwt.issuer, error)
        self._known = OrderedDict()  # a key that was withdrawn opens nothing more

    def find(self, token: str) -> Key | None:
        """The key that a token stands for, unless it is wrong, over, or for somebody else."""
        if not self.is_on or token.count(".") != 2 or len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            return None
        digest = hashlib.sha256(token.encode()).hexdigest()
        key = self._known.get(digest)
        if key is None:
            key = self._verified(token, digest)
            if key is None:
                return None
            self._known[digest] = key
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return None if key.expires_at_us is not None and key.expires_at_us <= now_us() else key

    def _verified(self, token: str, digest: str) -> Key | None:
        import jwt

        try:
            found = self._keys.get(jwt.get_unverified_header(token).get("kid"))
            if found is None:
                if time.monotonic() - self._read_at > EARLY_S:
                    self._wake.set()
                return None
            claims = jwt.decode(
                token, found, algorithms=list(self._jwt.algorithms), audience=self._jwt.audience,
                issuer=self._jwt.issuer, leeway=self._jwt.leeway_s, options={"require": ["exp", "iss", "aud", "sub"]},
            )  # fmt: skip
            return self._key(claims, digest)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            log.info("a token was refused: %s", error)
            return None

    def _key(self, claims: dict[str, Any], digest: str) -> Key | None:
        tenant = self._named(claims, self._jwt.tenant_claim, self._settings.tenant)
        workspace = self._named(claims, self._jwt.workspace_claim, self._settings.workspace)
        given = claims.get(self._jwt.scopes_claim, "")
        words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
        subject = str(claims["sub"])
        if tenant is None or workspace is None or not subject:
            return None
        owner = hashlib.sha256(f"{tenant}\0{subject}".encode()).hexdigest()[:28]
        return Key(
            digest=digest, key_id=f"jwt-{owner}", name=subject[:128], tenant=tenant, workspace=workspace,
            scopes=frozenset(w for w in words if isinstance(w, str)) & frozenset(self._jwt.scopes), user_tier=None,
            created_at_us=0, expires_at_us=round((claims["exp"] + self._jwt.leeway_s) * SECOND_US), revoked_at_us=None,
        )  # fmt: skip

    def _named(self, claims: dict[str, Any], claim: str | None, fixed: str) -> str | None:
        if claim is None:
            return fixed
        value = claims.get(claim)
        return value if isinstance(value, str) and NAME.fullmatch(value) else None

    def _document(self) -> Any:
        if self._jwt.jwks_file is not None:
            return json.loads(Path(self._jwt.jwks_file).read_text(encoding="utf-8"))
        opener = urllib.request.build_opener(_NoRedirects())
        with opener.open(str(self._jwt.jwks_url), timeout=FETCH_TIMEOUT_S) as response:
            return json.loads(response.read(MAX_KEY_SET_BYTES))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key set that lies elsewhere is somebody else's."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer counts as an error."""


def _parsed(document: Any) -> dict[str | None, Any]:
    import jwt

    try:
        keys = jwt.PyJWKSet.from_dict(document).keys
    except (jwt.PyJWTError, AttributeError, TypeError) as error:
        raise ValueError(f"it is no key set: {error}") from None
    return {key.key_id: key for key in keys if getattr(key, "key_type", None) != "oct"}
