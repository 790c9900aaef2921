"""`rayloop prompt`: the versioned prompts of agents."""

import getpass
import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cluster.database import connect
from cluster.errors import InputError, NotFoundError
from cluster.logs import configure_logging
from cluster.options import ConfigOption, JsonOption
from cluster.settings import load_settings
from data.prompt import AgentPrompt
from data.prompt_versions import parse_prompt, prompt_versions, set_prompt

app = typer.Typer(no_args_is_help=True, add_completion=False)

AgentArgument = Annotated[str, typer.Argument(help="The agent whose prompt it is.")]


@app.command("set")
def set_command(
    agent: AgentArgument,
    file: Annotated[Path, typer.Argument(help="YAML with `system` and `refusals`; keep it under version control.")],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Put a prompt in force, on all routers within a second; versions trained with another must be trained anew."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    declared = parse_prompt(_read(file))
    writer = f"person:{getpass.getuser()}"
    made = set_prompt(connect(settings), settings.tenant, settings.workspace, agent, declared, writer=writer)
    if json_output:
        print(json.dumps(_document(agent, made)))
    else:
        print(f"{_line(agent, made)}\nnext: rayloop train run --agent {agent}")


@app.command("list")
def list_command(
    agent: Annotated[str | None, typer.Argument(help="One agent; all of them without.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """The versions of the prompts, the one in force last."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    found = prompt_versions(connect(settings), settings.tenant, agent)
    if json_output:
        print(json.dumps({"prompts": [_document(name, prompt) for name, prompt in found]}))
    else:
        print("\n".join(_line(*each) for each in found) or "no prompts; next: rayloop prompt set AGENT FILE")


@app.command()
def show(
    agent: AgentArgument,
    number: Annotated[int | None, typer.Option(min=1, help="Another than the one in force.")] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """A prompt as the model reads it."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    versions = prompt_versions(connect(settings), settings.tenant, agent)
    found = [prompt for _, prompt in versions if number in (None, prompt.number)]
    if not found:
        wanted = f"no prompt {number}" if number is not None else "no prompt"
        raise NotFoundError(f"agent {agent!r} has {wanted}; see `rayloop prompt list`")
    print(json.dumps(_document(agent, found[-1])) if json_output else found[-1].text)


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("file", str(file), f"cannot be read ({error})", "name an existing file") from None
    except yaml.YAMLError as error:
        raise InputError("file", str(file), f"is not YAML ({str(error).splitlines()[0]})", "mend it") from None


def _document(agent: str, prompt: AgentPrompt) -> dict[str, Any]:
    return {
        "agent": agent,
        "number": prompt.number,
        "digest": prompt.digest,
        "system": prompt.system,
        "refusals": [refusal.as_json() for refusal in prompt.refusals],
        "text": prompt.text,
    }


def _line(agent: str, prompt: AgentPrompt) -> str:
    cases = sum(len(refusal.cases) for refusal in prompt.refusals)
    told = f"{len(prompt.refusals)} refusals, {cases} cases" if prompt.text else "no prompt"
    return f"{agent} prompt {prompt.number} {prompt.digest[:12]}  {told}"
