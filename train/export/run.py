"""`rayloop export`: a version as files, whole or not at all, and checked before they appear."""

import hashlib
import json
import logging
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.database import connect
from cluster.errors import ConflictError, InputError, UnavailableError
from cluster.model_files import ADAPTER_FILES
from cluster.registry import EXPORT_TAGS, RETRAIN, Registry, Version
from cluster.settings import Settings
from data.prompt_versions import texts_by_digest
from train.export.check import Agreement, check_template, expect, load_exported
from train.export.gguf import chat_template_of, converter, write_gguf
from train.export.merge import write_merged
from train.export.modelfile import modelfile, role_template
from train.files import check_replaceable, written_whole
from train.generate import end_tokens
from train.models import load_adapter, load_tokenizer

log = logging.getLogger(__name__)

FORMATS = ("hf", "merged", "gguf", "ollama")
GGUF_FILE, MODELFILE = "model.gguf", "Modelfile"
ABOUT = "rayloop.json"
"""In every export: which version it is. Only a folder with it is ever replaced."""
MERGED = "merged"  # scratch folder beside the GGUF file
ADAPTER_FOLDER = "adapter"
WITH_ADAPTER = ("llama", "mistral", "gemma", "gemma2")
"""Model types whose adapters Ollama reads as safetensors."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    version: str
    format: str
    path: str
    identical: int
    """Prompts of the check with the same greedy tokens…"""
    prompts: int
    """…of so many."""
    by_engine: bool = False
    """As an engine answers, and not base and adapter in this process."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def export(settings: Settings, ref: str, kind: str, out: Path) -> Exported:
    """Write a version to the folder `out`, and keep with the version where it went.

    Raises:
        NotFoundError: no such version.
        InputError: an unknown format, no adapter to write, no converter, a place that cannot be written or holds
            other things than an export, a template that Ollama cannot express.
        ConflictError: the exported weights answer differently, the template is not the one of training, or somebody
            in what the version learned from was erased.
    """
    if kind not in FORMATS:
        raise InputError("to", kind, f"must be one of {', '.join(FORMATS)}", "choose one of them")
    out = out.expanduser().resolve()
    check_replaceable(out, (ABOUT,))
    if kind in ("gguf", "ollama"):
        converter()
    registry = Registry(settings)
    version = registry.get(ref)
    if version.needs_retraining:
        raise ConflictError(f"{version.id} cannot be exported: {RETRAIN}; export another version")
    if version.endpoint is not None:
        raise ConflictError(f"{version.id} cannot be exported: its weights are kept by {version.endpoint}")
    adapter = registry.adapter_dir(version) if version.adapter_sha256 else None
    with written_whole(out) as scratch:
        agreement = _write(settings, version, adapter, kind, scratch)
        about = {"version": version.id, "name": version.name, "format": kind, "adapter_sha256": version.adapter_sha256}
        (scratch / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    registry.tag(version, f"{EXPORT_TAGS}.{kind}.{hashlib.sha256(str(out).encode()).hexdigest()[:8]}", str(out))
    return Exported(version.id, kind, str(out), **asdict(agreement))


def _write(settings: Settings, version: Version, adapter: Path | None, kind: str, folder: Path) -> Agreement:
    if kind == "hf":
        _write_adapter(version, adapter, folder)
        return Agreement(0, 0)
    merged = folder if kind == "merged" else folder / MERGED
    apart = adapter if kind == "ollama" and _goes_apart(settings, version, adapter) else None
    write_merged(merged, version.base_model, None if apart else adapter)
    check_template(merged, version)
    agreement = _check(settings, version, adapter, merged, on_top=apart)
    if kind == "merged":
        return agreement
    write_gguf(folder / GGUF_FILE, merged, settings.export.quantisation)
    if apart is not None:
        (folder / ADAPTER_FOLDER).mkdir()
        for name in ADAPTER_FILES:
            shutil.copyfile(apart / name, folder / ADAPTER_FOLDER / name)
    if kind == "ollama":
        _write_modelfile(settings, version, merged, folder, apart=apart is not None)
    agreement = _check(settings, version, adapter, merged, folder / GGUF_FILE, on_top=apart)
    shutil.rmtree(merged)
    return agreement


def _goes_apart(settings: Settings, version: Version, adapter: Path | None) -> bool:
    """Whether base and adapter are written beside each other, as is asked for, which Ollama must be able to read."""
    if adapter is None or not settings.export.ollama_adapter:
        return False
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(version.base_model).model_type
    if kind not in WITH_ADAPTER:
        log.warning("Ollama reads no adapters of %s models: base and adapter of %s are merged", kind, version.id)
    return kind in WITH_ADAPTER


def _write_adapter(version: Version, adapter: Path | None, folder: Path) -> None:
    """The adapter as PEFT loads it, with the tokenizer it was trained with."""
    if adapter is None:
        raise InputError("version", version.id, "has no adapter", "export it as merged")
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
    load_tokenizer(version.base_model).save_pretrained(folder)
    check_template(folder, version)


def _write_modelfile(settings: Settings, version: Version, merged: Path, folder: Path, *, apart: bool) -> None:
    tokenizer, chosen = load_tokenizer(str(merged)), settings.export
    stops = [tokenizer.decode([end]) for end in end_tokens(load_exported(merged), tokenizer)]
    text = modelfile(
        f"./{GGUF_FILE}",
        role_template(tokenizer),
        stops,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        name=f"{version.id} ({version.name})",
        adapter=f"./{ADAPTER_FOLDER}" if apart else None,
        system=_prompt_of(settings, version),
    )
    (folder / MODELFILE).write_text(text, encoding="utf-8")


def _prompt_of(settings: Settings, version: Version) -> str:
    """The agent's prompt that the version was trained behind; empty without one."""
    digest = version.tags.get("prompt_digest")
    if digest is None:
        return ""
    database = connect(settings)
    try:
        found = texts_by_digest(database, settings.tenant).get(digest)
    finally:
        database.dispose()
    if found is None:
        raise ConflictError(f"{version.id} was trained behind the prompt {digest[:12]}, which this database has not")
    return found


def _check(
    settings: Settings,
    version: Version,
    adapter: Path | None,
    merged: Path,
    gguf: Path | None = None,
    *,
    on_top: Path | None = None,
) -> Agreement:
    """Load what was written, the adapter on top where it stands apart, and compare its answers with the version's."""
    tokenizer = load_tokenizer(str(merged))
    if gguf is not None and chat_template_of(gguf) != tokenizer.get_chat_template():
        raise ConflictError(f"the GGUF file of {version.id} has another chat template than its tokenizer")
    if not settings.export.check_prompts:
        return Agreement(0, 0)
    model = load_exported(merged) if gguf is None else load_exported(gguf.parent, gguf.name)
    if on_top is not None:
        model = load_adapter(model, str(on_top), version.base_model).eval()
    ends = end_tokens(load_exported(merged), tokenizer)
    found = expect(settings, version, adapter).compare(model, ends)
    rounded = gguf is not None and settings.export.quantisation == "q8_0"
    least = settings.export.min_identical_q8_0 if rounded else settings.export.min_identical
    if found.share < least:
        raise ConflictError(
            f"the exported weights of {version.id} give the same greedy tokens on only {found.identical} of "
            f"{found.prompts} prompts; export with more precision (`export.quantisation`)"
        )
    return found


def create_in_ollama(folder: Path, name: str, *, push: bool = False) -> None:
    """Hand an exported folder to the `ollama` on this machine, and push it where asked.

    Raises:
        InputError: there is no `ollama` here.
        UnavailableError: it refused.
    """
    if shutil.which("ollama") is None:
        raise InputError("create", name, "needs `ollama` on this machine", "install it, or copy the folder there")
    commands = [["ollama", "create", name, "-f", MODELFILE]] + ([["ollama", "push", name]] if push else [])
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-200:]}")
