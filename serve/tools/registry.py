"""Tools: typed Python functions registered by a decorator; their schemas come from their types.

    from serve.tools import Caller, tool

    @tool(deadline_s=1.0)
    def stock(caller: Caller, sku: str, warehouse: str = "main") -> int:
        "How many pieces of an article are in a warehouse."

The first parameter is who calls; the model sees the others. A tool with `writes=True` is called with an
idempotency key, and must be safe to repeat under one key.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from cluster.errors import ConfigError, InputError
from cluster.settings import Settings
from data.events import input_error

F = TypeVar("F", bound=Callable[..., Any])
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What OpenAI takes for the name of a function."""


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a tool runs, and what it may use."""

    tenant: str
    workspace: str
    services: "Services"
    user_tier: str | None = None
    idempotency_key: str | None = None
    """Set for tools that write."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the built-in tools stand on; `serve.tools.deployment` fills it."""

    settings: Settings
    database: Any
    """SQLAlchemy engine of the installation."""
    intake: Any
    """`data.intake.batches.Intake`: the way into the event log."""
    sql: Any = None
    """`serve.tools.sql.ReadOnlySql`."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One registered function."""

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    result: TypeAdapter[Any]
    writes: bool = False
    deadline_s: float | None = None
    """`None`: the server's (`tools.deadline_s`)."""
    max_result_bytes: int | None = None
    """`None`: the server's (`tools.max_result_bytes`)."""

    @property
    def input_schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        return schema

    @property
    def output_schema(self) -> dict[str, Any]:
        """JSON Schema of the result."""
        return self.result.json_schema(mode="serialization")

    def parse(self, arguments: Any) -> dict[str, Any]:
        """The function's keyword arguments.

        Raises:
            InputError: names the argument and its rule.
        """
        if not isinstance(arguments, dict):
            raise InputError("arguments", arguments, "must be an object", "name the tool's parameters")
        try:
            parsed = self.arguments.model_validate(arguments)
        except ValidationError as error:
            found = input_error(error, f"see the schema of {self.name}")
            raise InputError(f"arguments.{found.field}", found.value, found.rule, found.remedy) from None
        return {name: getattr(parsed, name) for name in self.arguments.model_fields}

    def document(self) -> dict[str, Any]:
        """As `GET /v1/tools` lists it: OpenAI's function, and what else a caller wants to know."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function, "output": self.output_schema, "writes": self.writes}


@dataclass(slots=True)
class Registry:
    """Tools by name."""

    tools: dict[str, Tool] = field(default_factory=dict)

    def add(self, found: Tool) -> None:
        """Register a tool; the same function again is no change.

        Raises:
            ConfigError: another function has that name.
        """
        known = self.tools.get(found.name)
        if known is not None and known.function.__module__ != found.function.__module__:
            where = known.function.__module__
            raise ConfigError("tools", found.name, f"is registered already, in {where}", "give it another name")
        self.tools[found.name] = found

    def only(self, names: Iterable[str] | None) -> dict[str, Tool]:
        """The tools to serve.

        Raises:
            ConfigError: a name that nothing is registered under.
        """
        if names is None:
            return dict(self.tools)
        for name in names:
            if name not in self.tools:
                known = ", ".join(sorted(self.tools))
                raise ConfigError("tools.serve", name, f"is not registered; known are {known}", "name known tools")
        return {name: self.tools[name] for name in names}


REGISTRY = Registry()
"""Where `@tool` puts what it decorates."""


@overload
def tool(function: F, /) -> F: ...


@overload
def tool(
    function: None = None,
    *,
    name: str | None = None,
    writes: bool = False,
    deadline_s: float | None = None,
    max_result_bytes: int | None = None,
    registry: Registry = REGISTRY,
) -> Callable[[F], F]: ...


def tool(
    function: F | None = None,
    *,
    name: str | None = None,
    writes: bool = False,
    deadline_s: float | None = None,
    max_result_bytes: int | None = None,
    registry: Registry = REGISTRY,
) -> Any:
    """Register a function as a tool. Its docstring is what models read; its types are its schemas.

    Raises:
        ConfigError: a parameter or the result has no type, or the name is none a model could call.
    """

    def register(function: F) -> F:
        made = make_tool(function, name or str(getattr(function, "__name__", "")), writes=writes)
        limits = {"deadline_s": deadline_s, "max_result_bytes": max_result_bytes}
        registry.add(Tool(**{n: getattr(made, n) for n in made.__slots__} | limits))
        return function

    return register if function is None else register(function)


def make_tool(function: Callable[..., Any], name: str, *, writes: bool = False) -> Tool:
    """A tool from a function, without registering it.

    Raises:
        ConfigError: as `tool`.
    """
    if not NAME.fullmatch(name):
        raise ConfigError("tools", name, f"must match {NAME.pattern}", "give `name=`")
    hints = typing.get_type_hints(function, include_extras=True)
    _, *parameters = inspect.signature(function).parameters.values()
    untyped = [p.name for p in parameters if p.name not in hints] + ([] if "return" in hints else ["return"])
    if untyped:
        raise ConfigError(f"tools.{name}", untyped[0], "has no type", "annotate it: schemas come from types")
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is inspect.Parameter.empty else p.default) for p in parameters
    }
    arguments = create_model(f"{name}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
    description = inspect.getdoc(function) or ""
    return Tool(name, description, function, arguments, TypeAdapter(hints["return"]), writes)
