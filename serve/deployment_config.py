"""The deployment config: routes and engines that the router's `user_config` in a Serve config file declares.

A declaration is written into its row once, whenever its content differs from the one applied last; what others make of
the row afterwards stays.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy.engine import Connection, Engine

from cluster.database import write
from cluster.errors import ConfigError, ConflictError, InputError
from cluster.settings.serving import EngineEndpoint
from cluster.tables import routes
from serve.routes import (
    CHANGEABLE,
    CONFIG_WRITER,
    VERSION_PATTERN,
    Check,
    Route,
    RouteKey,
    changed,
    is_route,
    read_in,
    write_in,
)

AGENT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
SHOWN_VERSIONS = 20  # in an error message


class Declared(BaseModel):
    """A route in a deployment config. Fields left out keep the value the row has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    agent: str = Field(pattern=AGENT_PATTERN)
    modality: str = Field("text", pattern=r"^[a-z]{1,16}$")
    tenant: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    stable: str | None = Field(None, pattern=VERSION_PATTERN)
    candidate: str | None = Field(None, pattern=VERSION_PATTERN)
    share: float = Field(0.0, ge=0, le=1)
    max_share: float = Field(1.0, ge=0, le=1)
    shadow: str | None = Field(None, pattern=VERSION_PATTERN)
    experiment_id: str | None = Field(None, max_length=64)
    pinned: bool = False

    @model_validator(mode="after")
    def _share_under_ceiling(self) -> "Declared":
        if self.share > self.max_share:
            raise ValueError(f"share {self.share:g} must not exceed max_share {self.max_share:g}")
        if self.candidate is not None and self.candidate == self.stable:
            raise ValueError(f"candidate must differ from stable, both are {self.stable}")
        return self

    def change(self) -> dict[str, Any]:
        """Only what the config says about the row."""
        return self.model_dump(include=set(CHANGEABLE), exclude_unset=True)

    def digest(self) -> str:
        """Hash of the content, by which a re-applied config is known."""
        text = orjson.dumps(self.model_dump(exclude_unset=True), option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(text).hexdigest()


class RouterConfig(BaseModel):
    """The router's `user_config` in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int | None = Field(None, ge=0)
    """A config with a smaller one than the last applied is refused."""
    routes: list[Declared] = []
    engines: dict[str, EngineEndpoint] = {}
    """Over `serve.engines` of the settings."""

    @model_validator(mode="after")
    def _each_route_once(self) -> "RouterConfig":
        keys = [(d.tenant, d.agent, d.modality) for d in self.routes]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"route {key[1]} ({key[2]}) is declared twice")
        return self


def parse_config(document: Any) -> RouterConfig:
    """The config behind a `user_config` document.

    Raises:
        ConfigError: the first broken rule, with its place.
    """
    try:
        return RouterConfig.model_validate(document or {})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("user_config", *problem["loc"]))
        rule = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(place, problem["input"], rule, "mend the Serve config and deploy it again") from None


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one declared route."""

    key: RouteKey
    status: Literal["applied", "unchanged"]
    revision: int


def apply_config(
    engine: Engine,
    config: RouterConfig,
    *,
    tenant: str,
    workspace: str = "default",
    known: Collection[str] | None = None,
    check: Check | None = None,
) -> list[Applied]:
    """Write each declared route whose content differs from what a config last put there; all or none.

    A route whose declaration is unchanged is left alone, whatever others have made of it since. `known` are the
    versions that may be named; `None` means any. `check` is as in `write_route`.

    Raises:
        ConfigError: the generation is older than the last applied, a version is not known, or a route cannot be
            made.
    """
    with write(engine).begin() as connection:
        writing = _Writing(engine, connection, config.generation, workspace, known, check)
        return [writing.apply(declared, declared.tenant or tenant) for declared in config.routes]


@dataclass(frozen=True, slots=True)
class _Writing:
    """One config on its way into the rows, in one transaction."""

    engine: Engine
    connection: Connection
    generation: int | None
    workspace: str
    known: Collection[str] | None
    check: Check | None

    def apply(self, declared: Declared, tenant: str) -> Applied:
        """Write one route."""
        key = RouteKey(tenant, declared.agent, declared.modality)
        before = read_in(self.connection, key)
        known = before.config_generation if before else None
        if self.generation is not None and known is not None and self.generation < known:
            raise ConfigError(
                "generation", self.generation, f"must be at least {known}, which was applied to {key}", "raise it"
            )
        digest = declared.digest()
        newest = self.generation if self.generation is not None else known
        if before is not None and before.config_hash == digest:
            if newest != known:
                where = is_route(key) & (routes.c.revision == before.revision)
                self.connection.execute(routes.update().where(where).values(config_generation=newest))
            return Applied(key, "unchanged", before.revision)
        if self.known is not None:
            _require_known(declared, before, self.known)
        try:
            after = changed(before, key, declared.change(), CONFIG_WRITER)
        except (InputError, ConflictError) as error:
            raise ConfigError(
                f"routes.{declared.agent}", declared.change(), f"cannot be applied ({error})", "mend it"
            ) from None
        if self.check is not None:
            self.check(before, after)
        after = replace(after, config_hash=digest, config_generation=newest)
        revision = before.revision if before else 0
        reason = f"deployment config {digest[:12]}"
        route = write_in(self.engine, self.connection, before, after, revision, CONFIG_WRITER, reason, self.workspace)
        return Applied(key, "applied", route.revision)


def _require_known(declared: Declared, before: Route | None, known: Collection[str]) -> None:
    """A version nobody serves would fail every request sent to it; one the route has already is left to others."""
    for name in ("stable", "candidate", "shadow"):
        version = getattr(declared, name)
        if version is not None and version not in known and version != getattr(before, name, None):
            shown = ", ".join(sorted(known)[:SHOWN_VERSIONS]) or "none yet"
            raise ConfigError(
                f"routes.{declared.agent}.{name}", version, f"is not a version that an engine holds (known: {shown})",
                "have it served first, or name one under `engines.<name>.models`",
            )  # fmt: skip
