"""Whether a version was trained with the prompt that its agent has now.

Behind another prompt than it was trained with, an adapter answers in a setting that it has never seen. A base model was
trained with none and may have any.
"""

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.tables import servables
from data.prompt import AgentPrompt
from data.prompt_versions import current_prompt
from serve.routes import RouteKey


def why_other_prompt(database: Engine, key: RouteKey, version: str) -> str | None:
    """What keeps a version that engines hold from the agent's requests; `None` where the prompt is the same."""
    s = servables.c
    query = sa.select(s.adapter_sha256, s.prompt_digest).where(s.version == version).limit(1)
    with database.connect() as connection:
        row = connection.execute(query).first()
    return None if row is None else difference(row[0], row[1], current_prompt(database, key.tenant, key.agent))


def difference(adapter_sha256: str | None, trained: str | None, prompt: AgentPrompt | None) -> str | None:
    """How the prompt in training differs from the one in force; `None` where it does not."""
    now = None if prompt is None else prompt.digest
    if adapter_sha256 is None or trained == now:
        return None
    return f"it was trained with {_named(trained)}, the agent has {_named(now)}; train it anew"


def _named(digest: str | None) -> str:
    return "no prompt" if digest is None else f"the prompt {digest[:12]}"
