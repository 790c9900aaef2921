"""Reads `rayloop.yaml` and the environment, and remembers where each value came from."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from cluster.errors import ConfigError
from cluster.settings.model import Settings

Origin = dict[str, str]
"""Dotted field name -> `default`, `rayloop.yaml:12` or `RAYLOOP_SERVE__PORT`."""

CONFIG_FILE = "rayloop.yaml"
CLIENT = {f"RAYLOOP_{name}" for name in ("ENABLED", "URL", "API_KEY", "DRY_RUN", "TOOLS_URL", "GRADER_URL")}
"""What `serve.client` reads."""
NOT_SETTINGS = {"RAYLOOP_CONFIG", *CLIENT}
"""Environment variables with our prefix that are not fields of `Settings`."""


def load_settings(path: Path | str | None = None, **overrides: Any) -> tuple[Settings, Origin]:
    """The settings in force and the origin of each.

    The file is `path`, else `$RAYLOOP_CONFIG`, else `rayloop.yaml` in the current directory if it
    exists. Environment beats file, `overrides` (nested dicts) beat both.

    Raises:
        ConfigError: unreadable file, unknown field, wrong type or a bound broken.
    """
    file = _config_path(path)
    from_file, lines = _read_yaml(file) if file else ({}, {})
    from_env = _read_environment()
    merged = _merge(_merge(from_file, from_env), overrides)
    origin = {f: f"{file.name}:{n}" for f, n in lines.items()} if file else {}
    origin |= {f: _variable(f) for f in _leaves(from_env)}
    origin |= dict.fromkeys(_leaves(overrides), "command line")
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise _config_error(error, origin) from None
    return settings, {f: origin.get(f, "default") for f in _leaves(_dump(settings))}


def _config_path(path: Path | str | None) -> Path | None:
    chosen = path or os.environ.get("RAYLOOP_CONFIG")
    if chosen:
        file = Path(chosen)
        if not file.is_file():
            raise ConfigError("config", str(file), "does not exist", "name an existing file")
        return file
    file = Path(CONFIG_FILE)
    return file if file.is_file() else None


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The document, and the line of each leaf."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(file), f"cannot be read ({error})", "mend the file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else "?"
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError("config", f"{file}:{line}", f"is not valid YAML ({problem})", "mend that line") from None
    if document is None:
        return {}, {}
    if not isinstance(document, dict):
        raise ConfigError("config", str(file), "must be a mapping of sections", "see docs/configuration.md")
    return document, dict(_lines(node))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _lines(value, f"{name}.")


def _read_environment() -> dict[str, Any]:
    for variable in os.environ:
        if variable.startswith("RAYLOOP_") and variable not in NOT_SETTINGS:
            _check_variable(variable)
    return dict(EnvSettingsSource(Settings)())


def _check_variable(variable: str) -> None:
    if variable.startswith("RAYLOOP_TEST_"):
        return
    names = variable.removeprefix("RAYLOOP_").lower().split("__")
    model: Any = Settings
    for name in names:
        fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
        if name not in fields:
            known = [_variable(f) for f in _leaves(_dump(Settings.model_construct()))]
            close = difflib.get_close_matches(variable, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "see `rayloop config` for the names"
            raise ConfigError(variable, os.environ[variable], "names no setting", remedy)
        model = fields[name].annotation


def _variable(field: str) -> str:
    return "RAYLOOP_" + field.upper().replace(".", "__")


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _dump(settings: Settings) -> dict[str, Any]:
    return {name: _plain(getattr(settings, name)) for name in Settings.model_fields}


def _plain(value: Any) -> Any:
    return {n: _plain(getattr(value, n)) for n in type(value).model_fields} if isinstance(value, BaseModel) else value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _config_error(error: ValidationError, origin: Origin) -> ConfigError:
    """The first broken rule as one line; the count of the others follows."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if isinstance(whole := first.get("ctx", {}).get("error"), ConfigError):  # of a rule between sections
        return whole
    field = ".".join(str(part) for part in first["loc"]) or "config"
    value, rule = _broken(first)
    where = origin.get(field, CONFIG_FILE)
    remedy = f"set `{field}` in {where}" if first["type"] != "extra_forbidden" else f"remove it from {where}"
    if len(problems) > 1:
        remedy += f" ({len(problems) - 1} more)"
    return ConfigError(field, value, rule[0].lower() + rule[1:], remedy)


def _broken(problem: Any) -> tuple[Any, str]:
    """The value and the rule it breaks; of a rule over several fields of a section, those that it names."""
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return value, "is not a known setting"
    if problem["type"] != "value_error":
        return value, problem["msg"]
    rule = str(problem["ctx"]["error"])
    named = set(re.findall(r"\w+", rule))
    return {name: value[name] for name in value if name in named} if isinstance(value, dict) else value, rule
