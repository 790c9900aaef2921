"""The monthly look at agents: the rules there are, or the first ones, and a report that is kept with its month."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from cluster.clock import to_iso
from cluster.settings import Settings
from data.archetypes import LEAST_AGENTS, cluster_agents, groups_of, load_rules, profiles, report, save_rules, transfers
from data.log import EventLog

RULES = "rules.yaml"


@dataclass(frozen=True)
class Monthly:
    """What one month's look came to."""

    report: Path | None
    """`None` where too few agents are known."""
    rules: Path
    agents: int
    """With enough interactions."""
    archetypes: int
    transfers: int
    """Suggested."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"report": self.report and str(self.report), "rules": str(self.rules)}


def look_at_month(engine: Engine, settings: Settings, at_us: int) -> Monthly:
    """Write the report of the month that holds `at_us`; the same month again writes it anew.

    Rules that are there stay as people left them. The oldest reports leave.

    Raises:
        InputError: the rules cannot be read.
    """
    folder = settings.archetypes_root
    rules_file = folder / RULES
    found = profiles(EventLog(engine), settings)
    if not rules_file.exists():
        if len(found) < LEAST_AGENTS:
            return Monthly(None, rules_file, len(found), 0, 0)
        folder.mkdir(parents=True, exist_ok=True)
        save_rules(cluster_agents(found, settings.curation.archetypes), rules_file)
    rules = load_rules(rules_file)
    groups = groups_of(found, rules)
    written = folder / f"{to_iso(at_us)[:7]}.md"
    written.write_text(report(found, rules), encoding="utf-8")
    _forget(folder, settings.curation.archetypes.reports_kept)
    suggested = sum(len(transfers(members)) for members in groups.values())
    return Monthly(written, rules_file, len(found), len(groups), suggested)


def _forget(folder: Path, kept: int) -> None:
    """Remove all reports but the newest."""
    for old in sorted(folder.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9].md"))[:-kept]:
        old.unlink()
