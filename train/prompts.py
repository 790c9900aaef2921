"""The agent's prompt that a training learns behind, and that an evaluation asks behind."""

from sqlalchemy.engine import Engine

from data.manifest import Manifest
from data.prompt_versions import current_prompt
from train.config import TrainedPrompt


def trained_prompt(database: Engine, tenant: str, agent: str | None, manifest: Manifest) -> TrainedPrompt | None:
    """The prompt in force for the agent, with those that the dataset's examples begin with; `None` without either."""
    prompt = current_prompt(database, tenant, agent)
    recorded = {digest: used.text for digest, used in manifest.prompts.items()}
    if prompt is None:
        return TrainedPrompt(digest="", text="", recorded=recorded) if recorded else None
    return TrainedPrompt(digest=prompt.digest, text=prompt.text, recorded=recorded)
