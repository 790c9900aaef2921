"""Whether a version was trained with the prompt that its agent has now.

Behind another prompt than it was trained with, a version answers in a setting that it has never seen. A base model as
it comes was not trained here and may have any.
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
    query = sa.select(s.prompt_digest).where(s.version == version).limit(1)
    with database.connect() as connection:
        trained = connection.execute(query).scalar()
    return difference(trained, current_prompt(database, key.tenant, key.agent))


def difference(trained: str | None, prompt: AgentPrompt | None) -> str | None:
    """How the prompt in training (`Version.trained_behind`) differs from the one in force; `None` where it does not."""
    now = "" if prompt is None else prompt.digest
    if trained is None or trained == now:
        return None
    return f"it was trained with {_named(trained)}, the agent has {_named(now)}; train it anew"


def _named(digest: str) -> str:
    return f"the prompt {digest[:12]}" if digest else "no prompt"
