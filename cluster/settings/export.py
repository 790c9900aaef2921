"""Exports (training.md)."""

from typing import Literal

from pydantic import Field

from cluster.settings.base import Section


class ExportSettings(Section):
    """How a version leaves Rayloop, and how the result is checked."""

    quantisation: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """Numbers in a GGUF file; `auto` keeps 16 bits."""
    check_prompts: int = Field(50, ge=0)
    """Prompts answered greedily by the exported weights and by who serves the version; 0 leaves the check out."""
    check_with: Literal["auto", "engine", "here"] = "auto"
    """Whose answers those of the export must be: `engine` asks the running routers (`evaluation.router_url` and its
    key), `here` loads base and adapter in this process, `auto` asks the routers where they serve the version."""
    check_tokens: int = Field(32, ge=1)
    """Longest answer of this check."""
    min_identical: float = Field(0.9, ge=0, le=1)
    """An export whose answers are the same, token by token, on fewer of these prompts is refused."""
    min_identical_q8_0: float = Field(0.5, ge=0, le=1)
    """The same for 8 bits, whose rounding turns a close choice between two tokens."""
    ollama_adapter: bool = False
    """Ollama: write base and adapter apart (`ADAPTER`), so that several versions share a base. Only for Llama, Mistral
    and Gemma, whose adapters Ollama reads; else they are merged."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Default of the Ollama model."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Default of the Ollama model."""
