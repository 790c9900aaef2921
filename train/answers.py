"""`rayloop train generate`: the answers of a base model and its adapters to a file of prompts, without a server."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import InputError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings
from train.files import unwritable


def generate(
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    prompts: Annotated[Path, typer.Option(help='JSON lines of {"messages": [...]}.')],
    out: Annotated[Path, typer.Option(help="JSON lines of {line, adapter, text} to write.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Folder of an adapter; repeat it.")] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Also the base without an adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 256,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of prompts with a base model and with each of its adapters."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    from train.generate import Sampling

    adapters: list[Path | None] = [*(adapter or [])]
    if with_base or not adapters:
        adapters.insert(0, None)
    asked = read_prompts(prompts)
    sampling = Sampling(max_new_tokens, temperature, seed, batch_size)
    write_lines(out, answer_lines(base, adapters, asked, sampling))
    report = {"out": str(out.resolve()), "prompts": len(asked), "models": len(adapters)}
    print(json.dumps(report) if as_json else f"{len(asked)} prompts, {len(adapters)} models: {out}")


def answer_lines(
    base: str, adapters: Sequence[Path | None], prompts: Sequence[Any], sampling: Any
) -> Iterator[dict[str, Any]]:
    """One line an answer, model by model, in the order of the prompts."""
    from train.generate import LocalModel

    for folder in adapters:
        answers = LocalModel(base, folder).generate(prompts, sampling)
        name = None if folder is None else str(folder)
        yield from ({"line": n, "adapter": name, "text": a.text} for n, a in enumerate(answers, 1))


def write_lines(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        draft.replace(out)
    except OSError as error:
        raise unwritable(out, error) from None
    finally:
        draft.unlink(missing_ok=True)


def read_prompts(file: Path) -> list[list[dict[str, Any]]]:
    """The `messages` of each line.

    Raises:
        InputError: the file cannot be read, or a line has none; the message names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("prompts", str(file), f"cannot be read ({error})", "name a file of JSON lines") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
        except (ValueError, LookupError, TypeError):
            messages = None
        if not isinstance(messages, list) or not messages:
            rule = 'must be {"messages": [...]}'
            raise InputError(f"{file}:{number}", line[:80], rule, "mend that line") from None
        prompts.append(messages)
    if not prompts:
        raise InputError("prompts", str(file), "holds no prompt", "name a file of JSON lines")
    return prompts
