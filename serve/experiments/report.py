"""An experiment as people and programs read it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy.engine import Engine

from cluster.errors import InputError
from cluster.settings import Settings
from data.moments import EVERYBODY
from serve.experiments.caveats import caveats
from serve.experiments.readings import (
    periods_of,
    read_all,
    read_as_served,
    read_evidence,
    read_latency,
    read_split,
    segments_of,
)
from serve.experiments.store import get_experiment

HEAD = "candidate, control, effect, harm in (always valid), e (always valid), p (one look only), users"


def describe(engine: Engine, experiment_id: str, settings: Settings, segment: str | None = None) -> dict[str, Any]:
    """Everything about an experiment as plain values.

    Raises:
        NotFoundError: no such experiment.
        InputError: none of its users is in the segment.
    """
    experiment, own = get_experiment(engine, experiment_id), settings.experiment
    segments = segments_of(engine, experiment_id)
    if segment is not None and segment not in segments:
        raise InputError("segment", segment, f"must be one of {', '.join(segments) or 'none yet'}", "name one")
    periods: dict[str, Any] = {}
    for period in periods_of(engine, experiment_id):
        latency, latency_p = read_latency(engine, experiment_id, own, period=period)
        evidence = read_evidence(engine, experiment_id, own, period=period)
        readings = read_all(engine, experiment_id, own, period=period, segment=segment or EVERYBODY)
        adjusted = holm([reading.p_value for reading in readings])
        periods[period] = {
            "caveats": list(caveats(evidence, own)),
            "metrics": [asdict(r) | {"p_holm": p} for r, p in zip(readings, adjusted, strict=True)],
            "as_served": read_as_served(engine, experiment_id, period=period),
            "latency_p95_s": {arm: asdict(reading) for arm, reading in latency.items()} | {"p_value": latency_p},
        }
    return {
        "experiment": asdict(experiment),
        "split": asdict(read_split(engine, experiment_id, own)),
        "segments": segments,
        "segment": segment,
        "periods": periods,
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values that keep alpha over all of them together, in the same order; `None` stays.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = largest
    return adjusted


def to_text(document: dict[str, Any]) -> str:
    """The same for people; what makes the numbers doubtful comes before the numbers."""
    experiment, split = document["experiment"], document["split"]
    ended = experiment["outcome"] or experiment["state"]
    lines = [
        f"{experiment['experiment_id']}  {experiment['candidate']} against {experiment['stable']}  {ended}",
        f"split {split['users']}, expected {split['expected']}, p {split['p_value']:.3g} (always valid)",
    ]
    if document["segments"]:
        lines.append(f"segment {document['segment'] or 'everybody'}; there are {', '.join(document['segments'])}")
    for period, found in document["periods"].items():
        lines += ["", f"{period}: {HEAD}"]
        lines += [f"beware: {sentence}" for sentence in found["caveats"]]
        lines += [_row(row) for row in found["metrics"]]
        lines += [_latency(found["latency_p95_s"])] if "candidate" in found["latency_p95_s"] else []
        lines += [f"as served, fallbacks left out: {n} {mean:.4f}" for n, mean in found["as_served"].items()]
    return "\n".join(lines)


def _latency(found: dict[str, Any]) -> str:
    arms = (found[arm] for arm in ("candidate", "control") if arm in found)
    shown = " against ".join(f"{r['value']:.3g} [{r['low']:.3g}, {r['high']:.3g}] s" for r in arms)
    return f"latency p95: {shown}" + (f", equal with p {found['p_value']:.3g}" if found["p_value"] is not None else "")


def _row(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    means = "".join(f"{number(row[arm]['mean']):>10}" for arm in ("candidate", "control"))
    users = f"{row['candidate']['users']}/{row['control']['users']}"
    bounds = row["problem"] or f"[{number(row['harm_low'])}, {number(row['harm_high'])}]"
    evidence = "-" if row["e_value"] is None else f"{row['e_value']:.3g}"
    return (
        f"{row['metric']:<26}{means}{number(row['effect']):>10}{bounds:>22}{evidence:>10}{number(row['p_value']):>9}"
        f"{users:>12}"
    )
