"""`text_similarity`: how close an answer is to a reference, as in OpenAI's grader schema.

BLEU is sacreBLEU's sentence BLEU with effective order; ROUGE is rouge-score's F-measure over Unicode
words (its own tokenizer drops everything but a-z and 0-9); METEOR is NLTK's with Porter stems and without
WordNet's synonyms, which would have to be downloaded; `fuzzy_match` is rapidfuzz's normalised
insertion-deletion similarity 2·LCS/(|a|+|b|) over characters; `cosine` is that of two embeddings.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from data.grading.endpoint import SERVER_ERROR
from data.grading.judge import ModelGrader
from data.grading.screen import screen
from data.grading.text import check_template, normalise, render
from data.grading.types import (
    AbstainError,
    BaseGrader,
    Endpoint,
    FailedAnswerError,
    Graded,
    GraderConfig,
    Item,
    Question,
    version_of,
)

Metric = Literal[
    "cosine", "fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
]  # fmt: skip
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
    screen: bool = True
    """An answer that holds nothing but an opening, or speaks to its judge, has no similarity, unless the reference
    does so too."""

    @field_validator("input", "reference")
    @classmethod
    def _known_names(cls, value: str) -> str:
        check_template("template", value)
        return value


class TextSimilarity(BaseGrader[TextSimilarityConfig]):
    """Reward is the similarity, or whether it reaches the threshold."""

    modules: ClassVar[tuple[str, ...]] = ("text_similarity", "screen")
    libraries = tuple(version(name) for name in ("sacrebleu", "rouge-score", "nltk", "rapidfuzz"))

    def _grade(self, item: Item, sample: dict[str, Any]) -> Graded:
        text, reference = _both(self.config, item, sample)
        return _graded(self.config, similarity(self.config.evaluation_metric, text, reference))


class Cosine(ModelGrader[TextSimilarityConfig]):
    """Reward is the cosine of the two texts' embeddings, 0 where it is negative, or the threshold's verdict."""

    modules: ClassVar[tuple[str, ...]] = ("text_similarity", "judge", "screen")

    def __init__(self, config: TextSimilarityConfig, endpoint: Endpoint, model: str) -> None:
        super().__init__(config, endpoint)
        self.model = model
        self.version = version_of(config, self.modules, (endpoint.url, model))

    def _question(self, item: Item, sample: dict[str, Any]) -> Question:
        texts = _both(self.config, item, sample)
        if not texts[0].strip():
            raise FailedAnswerError("the answer is empty")
        return Question("/v1/embeddings", {"model": self.model, "input": list(texts)})

    def _read(self, question: Question, document: Any) -> Graded:
        try:
            left, right = (row["embedding"] for row in sorted(document["data"], key=lambda row: int(row["index"])))
            score = sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise AbstainError("the embeddings are no two vectors of one length", SERVER_ERROR) from None
        if not math.isfinite(score):
            raise AbstainError("the cosine is not finite", SERVER_ERROR)
        return _graded(self.config, max(score, 0.0))


def _both(config: TextSimilarityConfig, item: Item, sample: dict[str, Any]) -> tuple[str, str]:
    text, reference = render(config.input, item, sample), render(config.reference, item, sample)
    if not reference.strip():
        raise AbstainError("the reference is empty")
    if config.screen and (reason := screen(text)) is not None and screen(reference) is None:
        raise FailedAnswerError(reason)
    return text, reference


def _graded(config: TextSimilarityConfig, score: float) -> Graded:
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
    if metric == "meteor":
        return _meteor(words(text), words(reference))
    name = metric.replace("_", "").replace("rougel", "rougeL")
    return float(_rouge(name).score(reference, text)[name].fmeasure)


def words(text: str) -> list[str]:
    """Case-folded Unicode words."""
    return WORD.findall(text.casefold())


def fuzzy_match(left: str, right: str) -> float:
    """2·LCS/(|a|+|b|) over characters."""
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(left, right))


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


class _NoSynonyms:
    """Stands in for WordNet."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def _meteor(text: list[str], reference: list[str]) -> float:
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(reference, text, stemmer=PorterStemmer(), wordnet=_NoSynonyms()))


class _Words:
    """Unicode words in the shape rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge(name: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([name], tokenizer=_Words())
