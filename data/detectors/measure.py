"""How good the detectors are: precision and recall on the held-out cases, beside the bar each must reach."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.settings import Settings
from data.detectors.cases import FOLDER, cases
from data.detectors.interface import YES, Detector, Item
from data.detectors.make import detectors, sentiment_by, similarity_by, topics_of


@dataclass(frozen=True, slots=True)
class Measure:
    """What one detector reached on its held-out cases."""

    name: str
    cases: int
    found: dict[str, float]
    """Name of a number -> its value in [0, 1]."""
    bars: dict[str, float]
    """The least each number must be."""

    @property
    def met(self) -> bool:
        """True when every bar is reached."""
        return all(self.found[name] >= bar for name, bar in self.bars.items())

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "met": self.met}

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {self.found[name]:.2f} (bar {bar:g})" for name, bar in self.bars.items())
        numbers += "".join(f", {name} {value:.2f}" for name, value in self.found.items() if name not in self.bars)
        return f"{self.name}: {numbers} on {self.cases} held-out cases; {'met' if self.met else 'NOT MET'}"


def measure_all(settings: Settings) -> list[Measure]:
    """Every detector of the table, as the settings name it."""
    chosen = detectors(settings.curation.detectors)
    return [
        measure_similarity(settings),
        measure_binary("ungrounded", "grounding", chosen.ungrounded, settings, {"precision": 0.8, "recall": 0.7}),
        measure_binary("refusal", "refusal", chosen.refusal, settings, {"precision": 0.9, "recall": 0.9}),
        measure_binary("toxicity", "toxicity", chosen.toxicity, settings, {"precision": 0.85, "recall": 0.8}),
        measure_sentiment(settings),
        measure_topics(settings),
        measure_personal_data(),
    ]


def measure_binary(name: str, file: str, detector: Detector, settings: Settings, bars: dict[str, float]) -> Measure:
    """Precision and recall of a detector that says yes or no."""
    known = cases(file, "held_out")
    badness = detector([Item(case.text, [case.passage] if case.passage else []) for case in known])
    least = settings.curation.filter.ungrounded_share if name == "ungrounded" else YES
    said = [value is not None and value > least for value in badness]
    found = precision_recall(said, [case.label == "yes" for case in known])
    found["false alarms"] = false_alarms(detector, least)
    return Measure(name, len(known), found, bars)


def false_alarms(detector: Detector, least: float) -> float:
    """Share of ordinary sentences that a detector objects to; held-out precision alone hides how common they are."""
    badness = detector([Item(case.text) for case in cases("ordinary", "held_out")])
    return sum(value is not None and value > least for value in badness) / len(badness)


def precision_recall(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """Of what was said to be, the share that is; of what is, the share that was said to be."""
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    return {"precision": hits / max(1, sum(said)), "recall": hits / max(1, sum(true))}


def measure_similarity(settings: Settings) -> Measure:
    """Whether two queries ask the same, at the threshold of reformulations."""
    alike = similarity_by(settings.curation.detectors)
    lines = (FOLDER / "reformulation.jsonl").read_text(encoding="utf-8").splitlines()
    known = [case for case in map(json.loads, lines) if case["part"] == "held_out"]
    least = settings.implicit.reformulation_similarity
    said = [alike(case["first"], case["second"]) >= least for case in known]
    bars = {"precision": 0.85, "recall": 0.85}
    return Measure("similar query", len(known), precision_recall(said, [c["same"] for c in known]), bars)


def measure_sentiment(settings: Settings) -> Measure:
    """Agreement of the three-way sentiment with people."""
    sentiment = sentiment_by(settings.curation.detectors)
    known = cases("sentiment", "held_out")
    names = {"yes": "positive", "no": "negative", "neutral": "neutral"}
    agreeing = sum(sentiment(case.text) == names[case.label] for case in known)
    return Measure("sentiment", len(known), {"agreement": agreeing / len(known)}, {"agreement": 0.8})


def measure_topics(settings: Settings, seeds: int = 5) -> Measure:
    """The least adjusted Rand index between clusterings under different seeds, and with people's topics."""
    from itertools import combinations

    from sklearn.metrics import adjusted_rand_score

    named = settings.curation.detectors
    known = cases("topics", "held_out")
    texts, true = [case.text for case in known], [case.label for case in known]
    found = [topics_of(texts, len(set(true)), named, seed).assign(texts) for seed in range(seeds)]
    stable = min(float(adjusted_rand_score(one, two)) for one, two in combinations(found, 2))
    agreeing = min(float(adjusted_rand_score(true, one)) for one in found)
    return Measure("topic", len(known), {"ARI": stable, "ARI with people": agreeing}, {"ARI": 0.7})


def measure_personal_data() -> Measure:
    """Recall of the recognisers on the shipped sentences with structured personal data."""
    from data.recognisers import find

    known = cases("personal_data", "held_out")
    found = [{span.kind for span in find(case.text)} for case in known]
    wanted = [case.label for case in known]
    hits = sum(kind in kinds for kind, kinds in zip(wanted, found, strict=True) if kind != "none")
    wrong = sum(bool(kinds) for kind, kinds in zip(wanted, found, strict=True) if kind == "none")
    total = sum(kind != "none" for kind in wanted)
    numbers = {"recall": hits / total, "precision": hits / max(1, hits + wrong)}
    return Measure("residual personal data", len(known), numbers, {"recall": 0.99})
