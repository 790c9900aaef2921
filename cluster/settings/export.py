"""Exports (training.md)."""

from typing import Literal

from pydantic import Field

from cluster.settings.base import Section


class ExportSettings(Section):
    """How a version leaves Rayloop, and how the result is checked."""

    quantisation: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """Numbers in a GGUF file; `auto` keeps 16 bits."""
    check_prompts: int = Field(50, ge=0)
    """Prompts answered greedily by the exported weights and by base and adapter; 0 leaves the check out."""
    check_tokens: int = Field(32, ge=1)
    """Longest answer of this check."""
    min_identical: float = Field(0.9, ge=0, le=1)
    """An export whose answers are the same, token by token, on fewer of these prompts is refused."""
    min_identical_q8_0: float = Field(0.5, ge=0, le=1)
    """The same for 8 bits, whose rounding turns a close choice between two tokens."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Default of the Ollama model."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Default of the Ollama model."""
