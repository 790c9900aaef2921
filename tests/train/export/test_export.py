"""A version as files: what is written answers as the engine does, token by token."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cluster.cli import run_app
from cluster.database import connect
from cluster.errors import ConflictError, InputError, UnavailableError
from cluster.registry import Registry
from cluster.settings import Settings, load_settings
from cluster.settings.engines import EngineSettings
from data.prompt_versions import parse_prompt, set_prompt
from data.template import render, template_digest
from serve.engines.generation import SamplingParams
from serve.engines.http_api import EngineApi
from serve.engines.local import LocalEngine
from tests.serve.engines.models import build_adapter, build_base
from tests.serve.upstream import Server
from tests.toys import toy_examples, toy_feedback
from train.evaluate.truth import make_truths
from train.export import engine
from train.export.check import load_exported
from train.export.cli import app
from train.export.gguf import chat_template_of
from train.export.modelfile import conversations, modelfile, role_template
from train.export.run import export
from train.generate import LocalModel, Sampling, decode, end_tokens
from train.models import load_tokenizer

PROMPTS = [chat[:-1] for chat in toy_examples(50, seed=99)]


@dataclass(frozen=True)
class World:
    """A registered version of the toy base, and what the engine answers with it."""

    settings: Settings
    base: Path
    adapter: Path
    engine_ids: list[list[int]]


@pytest.fixture(scope="module")
def world(toy_base: Path, empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("export")
    settings = load_settings(home=folder / "home")[0]
    settings.home.mkdir()
    shutil.copy(empty_mlflow, settings.home / "mlflow.db")
    base, adapter = folder / "base", build_adapter(toy_base, folder / "adapter", seed=3, lora_alpha=1)
    shutil.copytree(toy_base, base)
    registry = Registry(settings)
    registry.register_base("triage", base)
    digest = template_digest(load_tokenizer(str(base)))
    registry.register_adapter("triage", adapter, base_model=base, lineage={"template_digest": digest})
    return World(settings, base, adapter, engine_answers(base, adapter))


def engine_answers(base: Path, adapter: Path) -> list[list[int]]:
    """Greedy token ids of the serving engine, without the end token."""
    engine = LocalEngine(EngineSettings(base_model=str(base)))
    engine.load_adapter("it", adapter)
    params = SamplingParams(max_tokens=24, temperature=0.0)

    async def ask(number: int) -> list[int]:
        updates = [u async for u in engine.generate("it", engine.render(PROMPTS[number]), params)]
        return [token for update in updates for token in update.token_ids]

    async def everyone() -> list[list[int]]:
        return await asyncio.gather(*[ask(number) for number in range(len(PROMPTS))])

    answers = asyncio.run(everyone())
    ends = {engine.tokenizer.eos_token_id}
    engine.close()
    return [[token for token in answer if token not in ends] for answer in answers]


def test_merged_weights_answer_as_the_engine_does(world: World, tmp_path: Path) -> None:
    found = export(world.settings, "triage/2", "merged", tmp_path / "out")
    assert found.identical == found.prompts > 0
    answers = LocalModel(tmp_path / "out").generate(PROMPTS, Sampling(24))
    assert [answer.token_ids for answer in answers] == world.engine_ids
    assert len({tuple(ids) for ids in world.engine_ids}) > 5


def test_huggingface_export_is_the_adapter_with_its_tokenizer(world: World, tmp_path: Path) -> None:
    export(world.settings, "triage/2", "hf", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (world.adapter / name).read_bytes()
    assert template_digest(AutoTokenizer.from_pretrained(tmp_path / "out"))
    with pytest.raises(InputError, match="has no adapter; export it as merged"):
        export(world.settings, "triage/1", "hf", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_gguf_file_answers_as_the_engine_does(world: World, tmp_path: Path) -> None:
    settings = load_settings(home=world.settings.home, export={"quantisation": "f32"})[0]
    found = export(settings, "triage/2", "ollama", tmp_path / "out")
    assert found.identical == found.prompts > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf", "rayloop.json"]
    tokenizer = load_tokenizer(str(world.base))
    assert chat_template_of(tmp_path / "out" / "model.gguf") == tokenizer.get_chat_template()

    model = load_exported(tmp_path / "out", "model.gguf")
    ends = end_tokens(load_exported(world.base), tokenizer)
    ids = [render(tokenizer, prompt, add_generation_prompt=True) for prompt in PROMPTS]
    answers = decode(model, ids, ends, Sampling(24))
    assert [[token for token in answer if token not in ends] for answer in answers] == world.engine_ids
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text and 'PARAMETER stop "<|end|>"' in text
    assert "PARAMETER temperature 0.7" in text and "PARAMETER top_p 0.9" in text


def test_ollama_gets_base_and_adapter_apart_where_it_reads_them(world: World, tmp_path: Path) -> None:
    asked = {"quantisation": "f32", "ollama_adapter": True}
    found = export(load_settings(home=world.settings.home, export=asked)[0], "triage/2", "ollama", tmp_path / "out")
    assert found.identical == found.prompts > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile",
        "adapter",
        "model.gguf",
        "rayloop.json",
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / "adapter" / name).read_bytes() == (world.adapter / name).read_bytes()
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf\nADAPTER ./adapter\n" in text
    model = load_exported(tmp_path / "out", "model.gguf")
    plain = load_exported(world.base)
    for name, weight in plain.state_dict().items():  # the base's weights, nothing merged into them
        assert torch.allclose(model.state_dict()[name], weight, atol=1e-6), name


def test_an_architecture_whose_adapters_ollama_cannot_read_is_merged(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.export import run

    monkeypatch.setattr(run, "WITH_ADAPTER", ("mistral",))
    asked = {"quantisation": "f32", "ollama_adapter": True}
    export(load_settings(home=world.settings.home, export=asked)[0], "triage/2", "ollama", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf", "rayloop.json"]
    assert "ADAPTER" not in (tmp_path / "out" / "Modelfile").read_text()


def test_modelfile_holds_the_prompt_of_the_training(world: World, tmp_path: Path) -> None:
    settings = world.settings
    database = connect(settings)
    declared = parse_prompt({"system": "Sort alerts."})
    made = set_prompt(database, "default", "default", "prompted", declared, writer="person:test")
    registry = Registry(settings)
    lineage = {"prompt_digest": made.digest}
    version = registry.register_adapter("prompted", world.adapter, base_model=world.base, lineage=lineage)
    export(settings, version.id, "ollama", tmp_path / "out")
    assert 'SYSTEM """Sort alerts."""' in (tmp_path / "out" / "Modelfile").read_text()
    lost = registry.register_adapter("lost", world.adapter, base_model=world.base, lineage={"prompt_digest": "0" * 64})
    with pytest.raises(ConflictError, match="trained behind the prompt 000000000000, which this database has not"):
        export(settings, lost.id, "ollama", tmp_path / "lost")


@pytest.fixture
def served(world: World) -> Iterator[str]:
    """An engine that holds `triage/2` under its own name."""
    engine = LocalEngine(EngineSettings(base_model=str(world.base)))
    engine.load_adapter("triage/2", world.adapter)
    with Server(EngineApi(engine)) as url:
        yield url
    engine.close()


def asking(world: World, url: str, **export: Any) -> Settings:
    return load_settings(home=world.settings.home, evaluation={"router_url": url}, export=export)[0]


def test_export_is_held_against_the_engine_that_serves_the_version(
    world: World, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLOOP_API_KEY", "rl-test")
    found = export(asking(world, served), "triage/2", "merged", tmp_path / "out")
    assert found.by_engine and found.identical == found.prompts > 0
    other = build_adapter(world.base, tmp_path / "adapter", seed=77)
    made = Registry(world.settings).register_adapter("triage", other, base_model=world.base)
    monkeypatch.setattr("train.export.check.engine_answers", _as_version(world, "triage/2"))
    with pytest.raises(ConflictError, match="same greedy tokens on only"):
        export(asking(world, served), made.id, "merged", tmp_path / "other")


def _as_version(world: World, name: str) -> Any:
    """Asks for another version than is exported, as behind an engine that holds the wrong one."""
    version = Registry(world.settings).get(name)
    return lambda settings, _, prompts: engine.engine_answers(settings, version, prompts)


def test_an_engine_that_does_not_serve_the_version_is_done_without_unless_it_is_asked_for(
    world: World, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Registry(world.settings).register_adapter("unserved", world.adapter, base_model=world.base)
    monkeypatch.setenv("RAYLOOP_API_KEY", "rl-test")
    assert not export(asking(world, served), made.id, "merged", tmp_path / "out").by_engine
    with pytest.raises(UnavailableError, match=r"unserved/1 cannot be asked .* set export\.check_with to `here`"):
        export(asking(world, served, check_with="engine"), made.id, "merged", tmp_path / "strict")
    monkeypatch.delenv("RAYLOOP_API_KEY")
    assert not export(asking(world, served), "triage/2", "merged", tmp_path / "keyless").by_engine
    with pytest.raises(InputError, match="must hold a key for the routers"):
        export(asking(world, served, check_with="engine"), "triage/2", "merged", tmp_path / "refused")


def test_changed_template_of_the_base_blocks_the_export(world: World, tmp_path: Path) -> None:
    """The base's tokenizer was edited after the training."""
    base, settings = tmp_path / "base", world.settings
    shutil.copytree(world.base, base)
    registry = Registry(settings)
    digest = template_digest(load_tokenizer(str(base)))
    made = registry.register_adapter("edited", world.adapter, base_model=base, lineage={"template_digest": digest})
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|' + message.role", "' <|' + message.role")
    tokenizer.save_pretrained(base)
    with pytest.raises(ConflictError, match="was trained with the chat template"):
        export(settings, made.id, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_that_answers_differently_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is written without its adapter; what stood there before stays."""
    from train.export import run

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rayloop.json").write_text("before")
    real = run.write_merged
    monkeypatch.setattr(run, "write_merged", lambda folder, base, adapter: real(folder, base, None))
    with pytest.raises(ConflictError, match="same greedy tokens on only"):
        export(world.settings, "triage/2", "merged", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rayloop.json"]


def test_what_is_no_export_is_never_replaced(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "project"
    out.mkdir()
    (out / "work.py").write_text("mine")
    monkeypatch.chdir(out)
    for place in (out, Path(".")):
        with pytest.raises(InputError, match="holds other files, which would be removed; name a new folder"):
            export(world.settings, "triage/2", "hf", place)
    with pytest.raises(InputError, match="is a file"):
        export(world.settings, "triage/2", "hf", out / "work.py")
    assert [path.name for path in tmp_path.rglob("*")] == ["project", "work.py"]
    (out / "work.py").unlink()
    for _ in range(2):
        export(world.settings, "triage/2", "hf", Path("new"))
    export(world.settings, "triage/2", "hf", out / "again")


def test_a_version_says_where_it_was_exported_to_and_goes_nowhere_once_it_needs_retraining(
    world: World, tmp_path: Path
) -> None:
    registry = Registry(world.settings)
    version = registry.register_adapter("exported", world.adapter, base_model=world.base)
    for name in ("a", "b", "a"):
        export(world.settings, version.id, "hf", tmp_path / name)
    kept = {tag: value for tag, value in registry.get(version.id).tags.items() if tag.startswith("rayloop.export.hf.")}
    assert sorted(kept.values()) == [str(tmp_path / "a"), str(tmp_path / "b")]
    about = json.loads((tmp_path / "a" / "rayloop.json").read_text())
    assert (about["version"], about["format"], about["adapter_sha256"]) == (version.id, "hf", version.adapter_sha256)
    registry.tag(version, "rayloop.needs_retraining", "{}")
    with pytest.raises(ConflictError, match="exported/1 cannot be exported: somebody in its training data was erased"):
        export(world.settings, version.id, "hf", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_eight_bits_may_differ_more_but_not_on_everything(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.export import run
    from train.export.check import Agreement, Expected

    monkeypatch.setattr(run, "load_exported", lambda folder, gguf_file=None: None)
    monkeypatch.setattr(run, "end_tokens", lambda model, tokenizer: [])
    monkeypatch.setattr(run, "chat_template_of", lambda file: load_tokenizer(str(world.base)).get_chat_template())
    version = Registry(world.settings).get("triage/2")
    for quantisation, identical, fits in (("q8_0", 6, True), ("q8_0", 4, False), ("f16", 8, False)):
        agreement = Agreement(identical, 10)
        monkeypatch.setattr(Expected, "compare", lambda self, model, ends, found=agreement: found)
        monkeypatch.setattr(run, "expect", lambda settings, version, adapter: Expected([], [], 1))
        settings = load_settings(home=world.settings.home, export={"quantisation": quantisation})[0]
        if fits:
            assert run._check(settings, version, None, world.base, tmp_path / "model.gguf") == agreement
            continue
        with pytest.raises(ConflictError, match=f"only {identical} of 10"):
            run._check(settings, version, None, world.base, tmp_path / "model.gguf")


def test_prompts_with_tools_are_part_of_the_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.export import check

    tool = {"type": "function", "function": {"name": "close", "parameters": {"type": "object"}}}
    rows = toy_feedback(4)["sft"]
    rows = [{**row, "tools": json.dumps([tool])} for row in rows]
    monkeypatch.setattr(check, "find_dataset", lambda settings, ref: Path(ref))
    monkeypatch.setattr(check, "read_truths", lambda dataset, limit: make_truths(rows))
    version = replace(Registry(world.settings).get("triage/2"), dataset_id="tools")
    expected = check.expect(world.settings, version, None)
    assert len(expected.prompts) == 4
    assert all("tools: " in load_tokenizer(str(world.base)).decode(ids) for ids in expected.prompts)


def test_bad_input_is_refused(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="must be one of hf, merged, gguf, ollama"):
        export(world.settings, "triage/2", "onnx", out)
    other = build_adapter(build_base(tmp_path / "other"), tmp_path / "adapter", seed=1)
    made = Registry(world.settings).register_adapter("mixed", other, base_model=world.base)
    with pytest.raises(InputError, match="does not fit base model"):
        export(world.settings, made.id, "merged", out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export(world.settings, "triage/2", "merged", tmp_path / "file" / "out")
    assert not out.exists()


def test_command_prints_one_object(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLOOP_HOME", str(world.settings.home))
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["triage/2", "--to", "hf", "--out", str(tmp_path / "out"), "--json"], "export")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["format"] == "hf"
    with pytest.raises(SystemExit):
        run_app(app, ["triage/2", "--out", str(tmp_path / "x"), "--create", "mine"], "export")
    assert "goes with --to ollama" in capsys.readouterr().err


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}{{ m.role }}:{{ m.content }}\n{% endfor %}"


def with_template(base: Path, template: str) -> Any:
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA3, None])
def test_role_template_writes_what_the_training_template_writes(template: str | None, toy_base: Path) -> None:
    tokenizer = with_template(toy_base, template) if template else load_tokenizer(str(toy_base))
    found = role_template(tokenizer)
    chats = conversations(found.around)
    assert len(chats) == 30
    for chat in chats:
        assert found.text(chat) == tokenizer.decode(render(tokenizer, chat, add_generation_prompt=True))
    assert go_template(found.go(), chats[3]) == found.text(chats[3])


def test_template_beyond_roles_is_refused_not_approximated(toy_base: Path) -> None:
    with pytest.raises(InputError, match="cannot express this model's chat template"):
        role_template(with_template(toy_base, NUMBERED))


def test_modelfile_escapes_what_a_template_contains(toy_base: Path) -> None:
    found = role_template(with_template(toy_base, CHATML))
    text = modelfile("./m.gguf", found, ['"end"'], temperature=0.5, top_p=1.0, name="triage/2")
    assert '{{ "<|im_start|>user\\n" }}{{ .Content }}' in text
    assert 'PARAMETER stop "\\"end\\""' in text


def go_template(source: str, chat: list[dict[str, str]]) -> str:
    """Ollama's side, for the few words that our templates use."""
    start, _, rest = source.partition("{{- range .Messages }}")
    body, _, generation = rest.partition("{{- end }}{{- end }}")
    branches: dict[str, str] = {}
    for part in body.replace("{{- else if eq", "{{- if eq").split('{{- if eq .Role "')[1:]:
        role, _, text = part.partition('" }}')
        branches[role] = text
    written = "".join(fill(branches[m["role"]], m["content"]) for m in chat)
    return fill(start, "") + written + fill(generation, "")


def fill(text: str, content: str) -> str:
    pieces = [piece.partition(" }}")[0] for piece in text.split("{{ ")[1:]]
    return "".join(content if piece == ".Content" else json.loads(piece) for piece in pieces)
