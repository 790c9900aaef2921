"""`text_similarity`: how close an answer is to a reference, as in OpenAI's grader schema.

BLEU is sacreBLEU's sentence BLEU with effective order; ROUGE is rouge-score's F-measure over Unicode
words (its own tokenizer drops everything but a-z and 0-9); `fuzzy_match` is the normalised
insertion-deletion similarity 2·LCS/(|a|+|b|) over characters.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from data.grading.text import check_template, normalise, render
from data.grading.types import AbstainError, BaseGrader, GraderConfig, Item

Metric = Literal["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
WORD = re.compile(r"\w+")
GLEU_ORDER = 4  # longest n-gram of GLEU, as defined in its paper


class TextSimilarityConfig(GraderConfig):
    """`input` and `reference` are templates."""

    type: Literal["text_similarity"]
    input: str = "{{ sample.output_text }}"
    reference: str
    evaluation_metric: Metric
    pass_threshold: float | None = Field(None, ge=0, le=1)
    """With it the reward is 1 at or above, else 0."""

    @field_validator("input", "reference")
    @classmethod
    def _known_names(cls, value: str) -> str:
        check_template("template", value)
        return value


class TextSimilarity(BaseGrader[TextSimilarityConfig]):
    """Reward is the similarity, or whether it reaches the threshold."""

    modules: ClassVar[tuple[str, ...]] = ("text_similarity",)
    libraries = (version("sacrebleu"), version("rouge-score"))

    def _grade(self, item: Item, sample: dict[str, Any]) -> tuple[float, dict[str, float], str]:
        config = self.config
        text, reference = render(config.input, item, sample), render(config.reference, item, sample)
        if not reference.strip():
            raise AbstainError("the reference is empty")
        score = similarity(config.evaluation_metric, text, reference)
        reward = score if config.pass_threshold is None else float(score >= config.pass_threshold)
        return reward, {config.evaluation_metric: score}, f"{config.evaluation_metric} {score:.3f}"


def similarity(metric: Metric, text: str, reference: str) -> float:
    """Similarity in [0, 1] of an answer to a reference; 0 for an empty answer."""
    if not text.strip():
        return 0.0
    if metric == "fuzzy_match":
        return fuzzy_match(normalise(text), normalise(reference))
    if metric == "bleu":
        return _bleu(text, reference)
    if metric == "gleu":
        return gleu(words(text), words(reference))
    name = metric.replace("_", "").replace("rougel", "rougeL")
    return float(_rouge(name).score(reference, text)[name].fmeasure)


def words(text: str) -> list[str]:
    """Case-folded Unicode words."""
    return WORD.findall(text.casefold())


def fuzzy_match(left: str, right: str) -> float:
    """2·LCS/(|a|+|b|), the LCS by bits (Hyyrö 2004, https://www.stringology.org/event/2004/p8.html)."""
    if not left or not right:
        return float(left == right)
    positions: dict[str, int] = {}
    for index, character in enumerate(left):
        positions[character] = positions.get(character, 0) | 1 << index
    full = row = (1 << len(left)) - 1
    for character in right:
        matches = row & positions.get(character, 0)
        row = (row + matches | row - matches) & full
    common = len(left) - row.bit_count()
    return 2 * common / (len(left) + len(right))


def gleu(text: Sequence[str], reference: Sequence[str]) -> float:
    """Sentence GLEU: the lower of n-gram precision and recall, n = 1…4 (Wu et al. 2016, arXiv:1609.08144)."""
    left, right = _ngrams(text), _ngrams(reference)
    longest = max(left.total(), right.total())
    return (left & right).total() / longest if longest else 0.0


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    sizes = range(1, GLEU_ORDER + 1)
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))


def _bleu(text: str, reference: str) -> float:
    import sacrebleu

    return float(sacrebleu.sentence_bleu(text, [reference]).score) / 100


class _Words:
    """Unicode words in the shape rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge(name: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([name], tokenizer=_Words())
