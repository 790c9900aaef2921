"""`rayloop evaluate`: put two versions to the same prompts, run the suites, keep what was found (`record`)."""

import logging
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from cluster.database import connect
from cluster.errors import InputError
from cluster.registry import Registry, Version
from cluster.settings import Settings
from data.detectors.make import detectors
from data.grading import AtHand, Grader, make_grader
from data.grading.reward_model import Scorer
from data.manifest import find_dataset, load_manifest
from data.prompt_versions import current_prompt
from train.evaluate.cases import read_cases
from train.evaluate.evidence import Answers, Evidence, ask
from train.evaluate.gates import SUITES, run_suites
from train.evaluate.human import ask_people
from train.evaluate.models import open_version
from train.evaluate.off_policy import read_logged
from train.evaluate.parity import template_digests
from train.evaluate.prompted import BehindPrompt
from train.evaluate.record import record
from train.evaluate.truth import read_truths
from train.evaluate.types import Evaluation, could_not_run, verdict
from train.rewards import open_scorer

log = logging.getLogger(__name__)


Known = dict[tuple[str, Path], Answers]
"""Answers of versions that others are compared with, to a dataset's prompts and every case."""


def evaluate(
    settings: Settings,
    version_ref: str,
    *,
    against: str = "champion",
    dataset_ref: str | None = None,
    known: Known | None = None,
) -> Evaluation:
    """Evaluate a version against another and record the outcome, also where it could not be asked or judged: what it
    passed earlier then holds no longer.

    Several versions evaluated with the same `known` ask the one they are all compared with only once.

    Raises:
        NotFoundError: no such version or dataset.
        InputError: both are the same version, or what was configured (a suite's file, the grader) is broken; nothing is
            recorded.
    """
    registry = Registry(settings)
    version = registry.get(version_ref)
    champion = resolve_opponent(registry, version, against)
    dataset = find_dataset(settings, dataset_ref or version.dataset_id or "latest", agent=version.model)
    manifest, started = load_manifest(dataset), time.monotonic()
    found = Evaluation(
        version=version.id,
        against=champion.id,
        passed=False,
        gates=[],
        dataset_id=manifest.dataset_id,
        dataset_hash=manifest.dataset_hash,
        prompts=0,
        grader_version="",
    )
    try:
        evidence = gather(settings, registry, version, champion, dataset, known)
        evidence = ask_people(settings, version.model, evidence)
    except InputError:
        raise
    except Exception as error:
        log.warning("%s could not be evaluated: %s", version.id, error, exc_info=True)
        found = replace(found, gates=[could_not_run("answers", error)])
        return record(settings, registry, version, found, None)
    gathered = time.monotonic()
    gates = run_suites(evidence)
    found = replace(
        found,
        passed=verdict(gates),
        gates=gates,
        prompts=len(evidence.truths),
        grader_version=evidence.grader.version,
        seconds={"answers": gathered - started, "suites": time.monotonic() - gathered},
    )
    return record(settings, registry, version, found, evidence)


def resolve_opponent(registry: Registry, version: Version, against: str) -> Version:
    """The version to compare with: an alias of the same model, or a full reference.

    Raises:
        InputError: it is the version itself.
    """
    ref = against if "/" in against or "@" in against else f"{version.model}@{against}"
    opponent = registry.get(ref)
    if opponent.id == version.id:
        raise InputError("against", against, f"is {version.id} itself", "name another version with --against")
    return opponent


def gather(
    settings: Settings,
    registry: Registry,
    version: Version,
    champion: Version,
    dataset: Path,
    known: Known | None = None,
    suites: Collection[str] = tuple(SUITES),
) -> Evidence:
    """Ask both versions once, about the held-out truths and every case of the suites."""
    chosen = settings.evaluation
    known = {} if known is None else known
    scorer = open_scorer(chosen.reward_model)
    at_hand = AtHand.of(settings.grader, scorer)
    grader = make_grader(chosen.grader, field="evaluation.grader", at_hand=at_hand)
    judge = make_grader(chosen.judge, field="evaluation.judge", at_hand=at_hand) if chosen.judge else None
    applicable = [name for name in suites if name not in chosen.not_applicable]
    wanted = [name for name in applicable if SUITES[name].cases]
    asked = _behind_prompt(settings, version.model, dataset)
    cases = {name: asked.cases(name, read_cases(name, chosen.suites)) for name in wanted}
    truths = asked.truths(read_truths(dataset, limit=chosen.max_prompts))
    logged = asked.logged(read_logged(dataset, limit=chosen.max_logged)) if "off_policy" in applicable else []
    every = [case for rows in cases.values() for case in rows]

    def answers(role: Version) -> Answers:
        log.info("%s answers %d prompts", role.id, len(truths) + len(every))
        with open_version(settings, registry, role) as model:
            return ask(model, truths, every, logged)

    if (champion.id, dataset) not in known:
        known[champion.id, dataset] = answers(champion)
    return Evidence(
        settings=chosen,
        truths=truths,
        candidate=answers(version),
        champion=known[champion.id, dataset],
        grader=grader,
        cases=cases,
        judge=judge,
        reward_model=as_grader(scorer),
        logged=logged,
        toxicity=detectors(named).toxicity if (named := settings.curation.detectors).toxicity_model else None,
        trained=version.trained,
        prompts=(version.tags.get("prompt_digest"), asked.digest),
        template=template_digests(version),
    )


def _behind_prompt(settings: Settings, agent: str, dataset: Path) -> BehindPrompt:
    database = connect(settings)
    try:
        prompt = current_prompt(database, settings.tenant, agent)
    finally:
        database.dispose()
    recorded = [used.text for used in load_manifest(dataset).prompts.values()]
    return BehindPrompt(agent, prompt, tuple(recorded))


def as_grader(scorer: Scorer | None) -> Grader | None:
    """The reward model at hand as a grader of its raw scores' order."""
    if scorer is None:
        return None
    config = {"type": "reward_model", "name": "reward_model", "adapter_sha256": scorer.adapter_sha256}
    return make_grader(config, at_hand=AtHand(scorer=scorer))
