"""The driver on Kubernetes: patches `spec.serveConfigV2` of the RayService; KubeRay deploys it in place.

A patch carries the resource version it was made from, so the API server answers 409 when anybody has written in
between; then, and after a lost connection, the resource is read again and what still differs is patched. Only
`serveConfigV2` is written: a change of the cluster's own spec would start a new cluster beside the old one.
While KubeRay is upgrading the cluster nothing is written at all.
"""

import logging
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stamina
import yaml

from cluster.errors import ConfigError, ConflictError, UnavailableError
from cluster.settings.experiments import ApplicationSettings
from serve.applications.document import Application, Document, check_document, is_ours, reconciled
from serve.applications.driver import Said, status_of
from serve.applications.http_json import Api, RejectedError

log = logging.getLogger(__name__)

MERGE_PATCH = "application/merge-patch+json"
MANAGER = "rayloop"
UPGRADING = ("UpgradeInProgress", "RollbackInProgress")
RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class Access:
    """How the API server is reached; the token is read anew each time, for kubelet replaces it."""

    api: Api
    token_file: Path | None
    path: str
    """Of the RayService."""

    def headers(self) -> dict[str, str]:
        """The bearer token of the service account.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.token_file is None:
            return {}
        try:
            return {"authorization": f"Bearer {self.token_file.read_text().strip()}"}
        except OSError as error:
            remedy = "mount the service account's token (k8s/components/rayservice-driver)"
            raise ConfigError("rollout.applications.account_dir", str(self.token_file), str(error), remedy) from None


def access(settings: ApplicationSettings) -> Access:
    """The API server of the cluster this runs in, or the one of the settings.

    Raises:
        ConfigError: neither is there.
    """
    folder = settings.account_dir
    url, host = settings.api_url, os.environ.get("KUBERNETES_SERVICE_HOST")
    if url is None and host is None:
        raise ConfigError("rollout.applications.api_url", None, "is needed outside a cluster", "name the API server")
    in_cluster = f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
    authority, token, named = folder / "ca.crt", folder / "token", folder / "namespace"
    tls = ssl.create_default_context(cafile=str(authority)) if authority.is_file() else None
    namespace = settings.namespace or (named.read_text().strip() if named.is_file() else "default")
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayservices/{settings.rayservice}"
    reached = Api(url or in_cluster, settings.timeout_s, tls)
    return Access(reached, token if token.exists() or url is None else None, path)


class RayServiceDriver:
    """`Driver` over one RayService."""

    def __init__(self, access: Access, settings: ApplicationSettings) -> None:
        self.access, self.settings = access, settings

    def apply(self, wanted: Sequence[Application]) -> Said:
        """As `Driver.apply` says."""
        return _said(self._apply(wanted))

    def _apply(self, wanted: Sequence[Application]) -> dict[str, Any]:
        """The resource once it says what is wanted."""
        given = self.settings
        for attempt in stamina.retry_context(
            on=_is_passing, attempts=given.attempts, timeout=given.timeout_s, wait_initial=RETRY_S, wait_jitter=RETRY_S
        ):
            with attempt:
                return self._apply_once(wanted)
        raise AssertionError("unreachable")

    def _apply_once(self, wanted: Sequence[Application]) -> dict[str, Any]:
        found = self._ask("GET")
        document = _document(found)
        changed = reconciled(document, wanted, self.settings.template)
        if changed == document:
            return found
        if upgrade := _upgrade(found):
            raise _UpgradeError(f"RayService {self.settings.rayservice} is being changed ({upgrade})")
        check_document(changed)
        text = yaml.safe_dump(changed, sort_keys=False)
        version = found["metadata"]["resourceVersion"]
        patched = self._ask("PATCH", {"metadata": {"resourceVersion": version}, "spec": {"serveConfigV2": text}})
        log.info("RayService %s: applications are now %s", self.settings.rayservice, _names(changed))
        return patched

    def _ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        query = f"?fieldManager={MANAGER}&fieldValidation=Strict" if body else ""
        reached = self.access
        answer: dict[str, Any] = reached.api.ask(method, reached.path + query, reached.headers(), body, MERGE_PATCH)
        return answer


class _UpgradeError(UnavailableError):
    """KubeRay is moving to another cluster; the next tick tries again, not the next attempt."""


def _is_passing(error: Exception) -> bool:
    return isinstance(error, UnavailableError | ConflictError) and not isinstance(error, RejectedError | _UpgradeError)


def _document(resource: dict[str, Any]) -> Document:
    """Its Serve config.

    Raises:
        ConfigError: it is no YAML mapping.
    """
    text = resource["spec"].get("serveConfigV2")
    try:
        document = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        raise ConfigError("spec.serveConfigV2", text, f"is no YAML ({error})", "mend the RayService") from None
    if not isinstance(document, dict):
        raise ConfigError("spec.serveConfigV2", text, "must be a mapping", "mend the RayService")
    return document


def _upgrade(resource: dict[str, Any]) -> str | None:
    conditions = resource.get("status", {}).get("conditions", [])
    return next((c["type"] for c in conditions if c["type"] in UPGRADING and c["status"] == "True"), None)


def _said(resource: dict[str, Any]) -> Said:
    """What KubeRay says of our applications; of a change that it has not seen yet it says nothing."""
    status = resource.get("status", {})
    if status.get("observedGeneration", 0) < resource["metadata"].get("generation", 0):
        return {}
    active = status.get("activeServiceStatus", {}).get("applicationStatuses", {})
    return {
        name: status_of(str(found.get("status", "")), str(found.get("message", "")))
        for name, found in active.items()
        if is_ours(name)
    }


def _names(document: Document) -> str:
    return ", ".join(application["name"] for application in document["applications"])
