"""The bearer token between the router and this installation's own engine.

The engine listens on the same port as the router. Without a token, whoever can reach that port could skip
the router's keys, its split and its records.
"""

import hashlib
import hmac

from cluster.settings import Settings
from data.feedback import pseudonym_secret


def engine_token(settings: Settings) -> str:
    """The token, derived from the installation's secret, which router and engine both have.

    Raises:
        ConfigError: the secret cannot be read.
    """
    return hmac.new(pseudonym_secret(settings), b"rayloop engine", hashlib.sha256).hexdigest()
