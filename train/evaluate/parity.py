"""Whether a version is still rendered with the template, and asked behind the prompt, that it was trained with."""

from cluster.registry import Version
from train.evaluate.evidence import Evidence
from train.evaluate.types import Gate, outcome


def template_digests(version: Version) -> tuple[str, str] | None:
    """Digest recorded in training and that of the tokenizer that engines load now; `None`: none recorded."""
    recorded = version.tags.get("template_digest")
    if recorded is None:
        return None
    from data.template import template_digest
    from train.models import load_tokenizer

    return recorded, template_digest(load_tokenizer(version.base_model))


def prompt_parity(evidence: Evidence) -> Gate:
    """The agent's prompt is the one that the version was trained behind."""
    trained, served = evidence.prompts
    if not evidence.trained:
        return Gate("prompt", "not_applicable", detail="a base model, which was not trained here")
    if trained is None and served is None:
        return Gate("prompt", "not_applicable", detail="the agent has no prompt")
    shown = ["no prompt" if digest is None else digest[:12] for digest in evidence.prompts]
    return Gate("prompt", outcome(trained == served), detail=f"trained behind {shown[0]}, served behind {shown[1]}")


def template_parity(evidence: Evidence) -> Gate:
    """The trainer's template, special tokens and vocabulary are the engine's."""
    if not evidence.trained:
        return Gate("template", "not_applicable", detail="a base model, which was not trained here")
    if evidence.template is None:
        return Gate("template", "no_data", detail="no digest of the template was recorded in training")
    trained, served = evidence.template
    detail = f"trained with {trained[:12]}, rendered with {served[:12]}"
    return Gate("template", outcome(trained == served), detail=detail)
