"""The Serve config document with and without the applications of candidates: pure functions.

An application is named for its base model, so every version on that base shares it. It is a copy of the
application `engine` (or another one by settings) with a name, a prefix and a base model of its own; the
other applications stay as they are, to the byte, so Serve leaves them alone.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError

PREFIX = "engine-"
"""Applications of this name belong to the controller: it removes those that nobody wants."""
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Application:
    """An engine for one more base model."""

    name: str
    base_model: str
    """Local path or hub id."""


def application_name(base_model: str, base_revision: str | None) -> str:
    """The name of the application that serves a base model."""
    return PREFIX + hashlib.sha256(f"{base_model}\0{base_revision or ''}".encode()).hexdigest()[:12]


def is_ours(name: str) -> bool:
    """True for an application that only the controller brings up and takes down."""
    return name.startswith(PREFIX)


def reconciled(document: Document, wanted: Sequence[Application], template: str) -> Document:
    """The document with exactly the wanted applications of ours, and every other one as it is.

    Returns an equal document when nothing is to be done.

    Raises:
        ConfigError: an application is to be made and the one to copy is not there.
    """
    applications = list(document.get("applications") or [])
    known = {application["name"] for application in applications}
    names = {application.name for application in wanted}
    kept = [a for a in applications if not is_ours(a["name"]) or a["name"] in names]
    added = [_made(applications, application, template) for application in wanted if application.name not in known]
    return document | {"applications": kept + added}


def _made(applications: Sequence[Mapping[str, Any]], wanted: Application, template: str) -> Document:
    pattern = next((a for a in applications if a["name"] == template), None)
    if pattern is None:
        known = ", ".join(a["name"] for a in applications) or "none"
        remedy = "deploy it, or name another in `rollout.applications.template`"
        raise ConfigError("rollout.applications.template", template, f"is not deployed (there are {known})", remedy)
    made: Document = copy.deepcopy(dict(pattern))
    arguments = dict(made.get("args") or {}) | {"engine": wanted.name, "base_model": wanted.base_model}
    return made | {"name": wanted.name, "route_prefix": f"/{wanted.name}", "args": arguments}


def check_document(document: Document) -> None:
    """Check it against Ray Serve's own schema before it is sent.

    Raises:
        ConfigError: the first rule it breaks.
    """
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("applications", *problem["loc"]))
        raise ConfigError(place, problem["input"], problem["msg"], "mend the deployed Serve config") from None
