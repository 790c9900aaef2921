"""The versions of agents' prompts, in the table `agent_prompts`: the highest number of an agent is in force.

A version is never changed: a new one is written behind it, with a `prompt.changed` event in the same transaction.
"""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.engine import Connection, Engine

from cluster.clock import now_us
from cluster.database import write
from cluster.errors import ConflictError
from cluster.tables import agent_prompts
from data.events import Event, input_error, parse_body
from data.log import EventLog
from data.prompt import AgentPrompt, Refusal

MAX_CHARACTERS = 100_000
"""Of a prompt; a request carries it every time."""


class DeclaredRefusal(BaseModel):
    """One refusal in a prompt's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    rule: str = Field(min_length=1, max_length=2_000)
    cases: tuple[str, ...] = Field((), max_length=100)


class DeclaredPrompt(BaseModel):
    """A prompt's file. Both fields empty: the agent is to have no prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    system: str = Field("", max_length=MAX_CHARACTERS)
    refusals: tuple[DeclaredRefusal, ...] = Field((), max_length=100)

    def numbered(self, number: int) -> AgentPrompt:
        """As a version."""
        return AgentPrompt(number, self.system, tuple(Refusal(each.rule, each.cases) for each in self.refusals))


def parse_prompt(document: Any) -> DeclaredPrompt:
    """The prompt behind the document of a file.

    Raises:
        InputError: the first field that breaks its rule.
    """
    try:
        return DeclaredPrompt.model_validate(document)
    except ValidationError as error:
        raise input_error(error, "write `system`, and `refusals` with `rule` and `cases`") from None


def set_prompt(
    engine: Engine, tenant: str, workspace: str, agent: str, declared: DeclaredPrompt, *, writer: str
) -> AgentPrompt:
    """Put a prompt in force; one that is in force already is not written again.

    Raises:
        ConflictError: somebody else wrote at the same time.
    """
    with write(engine).begin() as connection:
        before = _current_in(connection, tenant, agent)
        made = declared.numbered(before.number + 1 if before else 1)
        if before is not None and (made.system, made.refusals) == (before.system, before.refusals):
            return before
        content = {
            "number": made.number,
            "digest": made.digest,
            "system": made.system,
            "refusals": [refusal.as_json() for refusal in made.refusals],
        }
        row = {"tenant": tenant, "agent": agent, **content, "created_at_us": now_us(), "created_by": writer}
        try:
            connection.execute(agent_prompts.insert().values(row))
        except sa.exc.IntegrityError:
            raise ConflictError(f"the prompt of {agent} was changed by somebody else; look again") from None
        body = parse_body("prompt.changed", {**content, "writer": writer})
        EventLog(engine).append_in(connection, [Event("prompt.changed", tenant, workspace, body, agent=agent)])
    return made


def current_prompt(engine: Engine, tenant: str, agent: str | None) -> AgentPrompt | None:
    """The prompt in force for an agent; `None` where it has none."""
    if agent is None:
        return None
    with engine.connect() as connection:
        found = _current_in(connection, tenant, agent)
    return found if found is not None and found.text else None


def prompt_versions(engine: Engine, tenant: str, agent: str | None = None) -> list[tuple[str, AgentPrompt]]:
    """Every version of an agent's prompt, or of all agents', with the agent; oldest first."""
    p = agent_prompts.c
    query = sa.select(agent_prompts).where(p.tenant == tenant).order_by(p.agent, p.number)
    if agent is not None:
        query = query.where(p.agent == agent)
    with engine.connect() as connection:
        return [(row["agent"], _prompt(row)) for row in connection.execute(query).mappings()]


def prompts_in_force(connection: Connection) -> dict[tuple[str, str], AgentPrompt]:
    """Tenant and agent -> the prompt in force, for all that have one."""
    p = agent_prompts.c
    newest = sa.select(p.tenant, p.agent, sa.func.max(p.number).label("number")).group_by(p.tenant, p.agent).subquery()
    same = (p.tenant == newest.c.tenant) & (p.agent == newest.c.agent) & (p.number == newest.c.number)
    rows = connection.execute(sa.select(agent_prompts).join(newest, same)).mappings()
    found = {(row["tenant"], row["agent"]): _prompt(row) for row in rows}
    return {key: prompt for key, prompt in found.items() if prompt.text}


def texts_by_digest(engine: Engine, tenant: str) -> dict[str, str]:
    """Digest -> text of every prompt the tenant's agents ever had."""
    return {prompt.digest: prompt.text for _, prompt in prompt_versions(engine, tenant) if prompt.text}


def _current_in(connection: Connection, tenant: str, agent: str) -> AgentPrompt | None:
    p = agent_prompts.c
    query = sa.select(agent_prompts).where(p.tenant == tenant, p.agent == agent).order_by(p.number.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    return None if row is None else _prompt(row)


def _prompt(row: Mapping[Any, Any]) -> AgentPrompt:
    refusals = tuple(Refusal(each["rule"], tuple(each["cases"])) for each in row["refusals"])
    return AgentPrompt(row["number"], row["system"], refusals)
