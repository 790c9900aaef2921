"""Writes the reference pages that are made from the code, and checks that they are up to date.

Run `python -m cluster.reference` to write `docs/configuration.md` and `docs/cli.md`, with `--check` to
fail when either differs from the code.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.cli import COMMANDS
from cluster.settings import Settings

ROOT = Path(__file__).parents[1]


def configuration_page() -> str:
    """Every setting with its type, default, bounds and meaning."""
    lines = [
        "# Configuration reference",
        "",
        "Made from the code by `python -m cluster.reference`. Every field may stand in `rayloop.yaml`",
        "or in the environment: `log.queue_events` is `RAYLOOP_LOG__QUEUE_EVENTS`. `rayloop config` prints",
        "what is in force and where each value came from.",
    ]
    top = [(n, f) for n, f in Settings.model_fields.items() if not _section(f)]
    lines += ["", "## Top level", "", *_table("", top)]
    for name, field in Settings.model_fields.items():
        if section := _section(field):
            lines += [
                "",
                f"## `{name}`",
                "",
                (section.__doc__ or "").strip(),
                "",
                *_table(f"{name}.", _leaves(section)),
            ]
    return "\n".join(lines) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if inner := _section(field):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _table(prefix: str, fields: object) -> Iterator[str]:
    yield "| setting | default | meaning |"
    yield "|---|---|---|"
    for name, field in fields:  # type: ignore[attr-defined]
        default = field.get_default(call_default_factory=True)
        bounds = ", ".join(_bound(m) for m in field.metadata)
        meaning = " ".join((field.description or "").split()) + (f" ({bounds})" if bounds else "")
        yield f"| `{prefix}{name}` | `{default}` | {meaning} |".replace("|---", "\\|---")


def _bound(rule: object) -> str:
    for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("pattern", "matches")):
        value = getattr(rule, attribute, None)
        if value is not None:
            return f"{sign} {value}".replace("|", "\\|")
    return str(rule)


def command_page() -> str:
    """`--help` of every command."""
    lines = ["# Command line reference", "", "Made from the code by `python -m cluster.reference`."]
    for name in COMMANDS:
        lines += ["", f"## `rayloop {name}`", "", "```text", _help([name]), "```"]
    return "\n".join(lines) + "\n"


def _help(words: list[str]) -> str:
    """Help of a command and, below it, of its sub-commands, as a plain terminal shows it."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TYPER_USE_RICH": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "cluster", *words, "--help"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())


PAGES: dict[str, Callable[[], str]] = {
    "docs/configuration.md": configuration_page,
    "docs/cli.md": command_page,
}


def main() -> None:
    """Write the pages, or with `--check` name those that differ."""
    stale = [page for page, render in PAGES.items() if not _matches(ROOT / page, render())]
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page} differs from the code; run `make format`", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for page in stale:
        (ROOT / page).write_text(PAGES[page](), encoding="utf-8")
        print(f"wrote {page}")


def _matches(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    main()
