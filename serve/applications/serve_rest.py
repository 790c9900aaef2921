"""The driver on Ray Serve's REST API: reads what is deployed, changes the applications of ours, puts it back.

A PUT replaces the whole document and knows no revision, so it is made only when something differs, from a
reading made just before. Serve restarts nothing whose entry is unchanged.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError, ConflictError, UnavailableError
from serve.applications.document import Application, Document, check_document, is_ours, reconciled
from serve.applications.driver import Said, status_of
from serve.applications.http_json import Api

log = logging.getLogger(__name__)

PATH = "/api/serve/applications/"
KEPT = ("proxy_location", "http_options", "grpc_options", "target_capacity")
REDACTED = "<redacted>"


class ServeRestDriver:
    """`Driver` over the dashboard of a cluster."""

    def __init__(self, api: Api, template: str) -> None:
        self.api, self.template = api, template

    def apply(self, wanted: Sequence[Application]) -> Said:
        """As `Driver.apply` says; after a PUT the new applications are seen at the next call."""
        details = self.api.ask("GET", PATH, _token())
        document = _document(details)
        changed = reconciled(document, wanted, self.template)
        if changed != document:
            if REDACTED in str(changed):
                raise ConflictError("the dashboard hides parts of the deployed config; it cannot be written back")
            check_document(changed)
            self.api.ask("PUT", PATH, _token(), changed)
            log.info("applications are now %s", ", ".join(a["name"] for a in changed["applications"]))
        return {
            name: status_of(str(found["status"]), str(found.get("message") or ""))
            for name, found in details["applications"].items()
            if is_ours(name)
        }


def _document(details: Mapping[str, Any]) -> Document:
    """The config that was deployed. Applications started by code have none, and Serve leaves them alone.

    Raises:
        UnavailableError: nothing is deployed, as while a cluster starts; a PUT would make that the truth.
    """
    deployed = [a["deployed_app_config"] for a in details.get("applications", {}).values()]
    applications = [dict(config) for config in deployed if config]
    if not applications:
        raise UnavailableError("no application is deployed by config yet")
    kept = {name: details[name] for name in KEPT if details.get(name) is not None}
    return kept | {"applications": applications}


def dashboard_url() -> str:
    """The dashboard of the cluster this process works in.

    Raises:
        ConfigError: it has none.
    """
    from ray._private.worker import get_dashboard_url

    found = get_dashboard_url()
    if not found:
        raise ConfigError(
            "rollout.applications.dashboard_url", None, "is needed, for this cluster shows none", "set it"
        )
    return f"http://{found}"


def _token() -> dict[str, str]:
    """Ray's token, where the cluster asks for one; read anew each time, for tokens are replaced."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return dict(get_auth_headers_if_auth_enabled({}))
