"""What every command about data begins and ends with: settings with logs, an answer as JSON."""

import json
from pathlib import Path
from typing import Any

from cluster.logs import configure_logging
from cluster.settings import Settings, load_settings


def command_settings(config: Path | None) -> Settings:
    """The settings in force, with logging as they say."""
    settings, _ = load_settings(config)
    configure_logging(settings.logging)
    return settings


def print_json(value: Any) -> None:
    """An answer for programs."""
    print(json.dumps(value, ensure_ascii=False))
