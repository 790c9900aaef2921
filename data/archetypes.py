"""Which agents are alike, and what one of them could learn from another: once a month.

An agent is described by the words its users ask with and the tools it calls. Agents of similar words form an
archetype, whose centroid is written as a few weighted terms in a YAML file; the rule for a new agent is the
nearest centroid, and people may edit terms or pin an agent. The report names, within each archetype, agents
whose users are surely less content than those of the best one: candidates for a transfer of its data.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.errors import DatasetError, InputError
from cluster.settings import Settings
from cluster.settings.curation import ArchetypeSettings
from data.detectors.topics import content_terms, fit_topics
from data.events import Event
from data.interaction_bodies import Message
from data.log import EventLog
from data.template import content_text

TOOL = "tool:"
LEAST_AGENTS = 2  # of fewer nothing is alike
Z = 1.96  # normal quantile of a 95 % interval


@dataclass
class Profile:
    """What is known of one agent."""

    agent: str
    interactions: int = 0
    terms: Counter[str] = field(default_factory=Counter)
    good: int = 0
    judged: int = 0
    asked: list[str] = field(default_factory=list)
    """Some questions, the first ones."""
    askers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Who asked with a term; some of them, where many did."""

    def keep_terms(self, least_users: int) -> None:
        """Forget the terms that too few people used: they may be about one of them."""
        self.terms = Counter({t: n for t, n in self.terms.items() if _is_tool(t) or len(self.askers[t]) >= least_users})
        self.askers.clear()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the share of good feedback; (0, 1) without any.

        Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
        """
        if not self.judged:
            return 0.0, 1.0
        n, share = self.judged, self.good / self.judged
        middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
        return middle - half, middle + half


@dataclass(frozen=True)
class Archetype:
    """Agents that are alike, and the rule that says who else would be."""

    name: str
    terms: dict[str, float]
    """Term -> weight, of unit length."""
    agents: tuple[str, ...]


def profiles(log: EventLog, settings: Settings) -> list[Profile]:
    """Every agent with enough interactions, in order of its name; one pass over the log."""
    limits = settings.curation.archetypes
    found: dict[str, Profile] = {}
    agent_of: dict[str, str] = {}
    kinds = ("interaction", "feedback")
    for recorded in log.scan(kinds=kinds, tenant=settings.tenant, page=settings.curation.page_events):
        event = recorded.event
        if event.workspace != settings.workspace or recorded.erased or event.interaction_id is None:
            continue
        if event.body.get("flags", {}).get("shadow"):  # an answer that nobody saw
            continue
        if event.kind == "interaction" and event.agent is not None:
            agent_of[event.interaction_id] = event.agent
            _asked(found.setdefault(event.agent, Profile(event.agent)), event, limits)
        elif event.kind == "feedback" and event.body.get("source") == "explicit" and event.body.get("reward"):
            agent = event.agent or agent_of.get(event.interaction_id)
            if agent is not None:
                profile = found.setdefault(agent, Profile(agent))
                profile.judged += 1
                profile.good += event.body["reward"] > 0
    for profile in found.values():
        profile.keep_terms(limits.term_users)
    return [found[name] for name in sorted(found) if found[name].interactions >= limits.min_interactions]


def _is_tool(term: str) -> bool:
    return term.startswith(TOOL)


def _asked(profile: Profile, event: Event, limits: ArchetypeSettings) -> None:
    body, asker = event.body, event.user_id or event.session_id or event.event_id
    profile.interactions += 1
    if len(profile.asked) >= limits.questions_per_agent:
        return
    messages: list[Message] = body["messages"]
    question = " ".join(content_text(message) for message in messages if message["role"] == "user")
    tools = [tool.get("function", {}).get("name", "") for tool in body.get("tools") or []]
    profile.asked.append(question)
    used = set(content_terms(question))
    for term in used:
        if len(profile.askers[term]) < limits.term_users:
            profile.askers[term].add(asker)
    profile.terms.update([*used, *(f"{TOOL}{name}" for name in tools if name)])


def cluster_agents(found: Sequence[Profile], settings: ArchetypeSettings) -> list[Archetype]:
    """Archetypes by k-means over the agents' words.

    Raises:
        DatasetError: fewer than two agents are known well enough.
    """
    if len(found) < LEAST_AGENTS:
        raise DatasetError(f"{len(found)} agents have enough interactions; archetypes need two or more")
    number = min(settings.number or max(1, round(math.sqrt(len(found) / 2))), len(found))
    texts = [" ".join(profile.terms.elements()) for profile in found]
    groups: dict[int, list[Profile]] = defaultdict(list)
    for profile, topic in zip(found, fit_topics(texts, number).assign(texts), strict=True):
        groups[topic].append(profile)
    everywhere = Counter(term for profile in found for term in profile.terms)
    made = [_archetype(groups[topic], everywhere, len(found), settings.terms) for topic in sorted(groups)]
    return sorted(made, key=lambda archetype: archetype.agents)


def _archetype(members: list[Profile], everywhere: Counter[str], agents: int, most: int) -> Archetype:
    totals: Counter[str] = Counter()
    for profile in members:
        shares = {term: n / profile.interactions for term, n in profile.terms.items()}
        totals.update({t: share * (1 + math.log((1 + agents) / (1 + everywhere[t]))) for t, share in shares.items()})
    top = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:most]
    length = math.sqrt(sum(weight * weight for _, weight in top)) or 1.0
    terms = {term: round(weight / length, 4) for term, weight in top}
    return Archetype(" ".join(list(terms)[:3]) or "empty", terms, tuple(sorted(p.agent for p in members)))


def nearest(terms: Mapping[str, float], rules: Sequence[Archetype]) -> str:
    """The archetype whose centroid has the greatest cosine with an agent's terms."""
    length = math.sqrt(sum(value * value for value in terms.values())) or 1.0

    def likeness(rule: Archetype) -> float:
        own = math.sqrt(sum(weight * weight for weight in rule.terms.values())) or 1.0
        return sum(weight * terms.get(term, 0.0) for term, weight in rule.terms.items()) / (own * length)

    return max(rules, key=lambda rule: (likeness(rule), rule.name)).name


def save_rules(rules: Sequence[Archetype], path: Path) -> None:
    """The mapping rules as YAML that people can edit."""
    document = [{"name": r.name, "agents": list(r.agents), "terms": r.terms} for r in rules]
    head = "# The archetype of an agent is the nearest centroid; agents listed here are pinned to theirs.\n"
    path.write_text(head + yaml.safe_dump({"archetypes": document}, sort_keys=False, allow_unicode=True))


def load_rules(path: Path) -> list[Archetype]:
    """The rules in a file, as written or as edited.

    Raises:
        InputError: the file is missing or not of that form.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        rules = [
            Archetype(str(r["name"]), {str(t): float(w) for t, w in r["terms"].items()}, tuple(map(str, r["agents"])))
            for r in document["archetypes"]
        ]
    except OSError as error:
        raise InputError("rules", str(path), f"cannot be read ({error.strerror})", "name an existing file") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        rule = f"must list archetypes with name, agents and terms ({error!r})"
        raise InputError("rules", str(path), rule, "write it anew with `rayloop data archetypes`") from None
    if not rules:
        raise InputError("rules", str(path), "must hold at least one archetype", "list one")
    return rules


def archetype_of(profile: Profile, rules: Sequence[Archetype]) -> str:
    """The archetype an agent is pinned to, else the nearest."""
    pinned = next((rule.name for rule in rules if profile.agent in rule.agents), None)
    return pinned or nearest({t: n / max(1, profile.interactions) for t, n in profile.terms.items()}, rules)


def groups_of(found: Sequence[Profile], rules: Sequence[Archetype]) -> dict[str, list[Profile]]:
    """The agents of each archetype that has any, those first whose users are surely the most content."""
    groups: dict[str, list[Profile]] = defaultdict(list)
    for profile in found:
        groups[archetype_of(profile, rules)].append(profile)
    return {name: sorted(groups[name], key=lambda p: (-p.interval[0], p.agent)) for name in sorted(groups)}


def report(found: Sequence[Profile], rules: Sequence[Archetype]) -> str:
    """Markdown: the agents of each archetype with their evidence, and transfers worth trying."""
    lines = ["# Archetypes"]
    for name, members in groups_of(found, rules).items():
        lines += ["", f"## {name}", "", "| agent | interactions | judged | good | 95 % interval |"]
        lines.append("|---|---|---|---|---|")
        lines += [_member_line(profile) for profile in members]
        suggested = [_transfer_line(members[0], worse) for worse in transfers(members)]
        lines += ["", *(suggested or ["No transfer suggests itself."])]
    return "\n".join(lines) + "\n"


def transfers(members: Sequence[Profile]) -> list[Profile]:
    """Of agents in order of the least their users like them: those whose interval lies below the first one's."""
    return [profile for profile in members[1:] if profile.interval[1] < members[0].interval[0]]


def _member_line(profile: Profile) -> str:
    low, high = profile.interval
    share = f"{profile.good / profile.judged:.1%}" if profile.judged else "-"
    return f"| {profile.agent} | {profile.interactions} | {profile.judged} | {share} | {low:.1%} to {high:.1%} |"


def _transfer_line(best: Profile, worse: Profile) -> str:
    return (
        f"- `{worse.agent}` could start from the examples of `{best.agent}`: at most {worse.interval[1]:.1%} of its "
        f"feedback is good, at least {best.interval[0]:.1%} there."
    )
