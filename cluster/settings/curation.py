"""From events to a dataset (curation.md)."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.settings.base import Section


class WeighSettings(Section):
    """How much one user's signals may count."""

    votes_per_day: int = Field(20, ge=1)
    """Votes of one user on one day (UTC) that count in full; more share this weight between them."""
    dataset_share: float = Field(0.05, gt=0, le=1)
    """Share of all votes that one user may have."""
    day: Literal["recorded", "occurred"] = "recorded"
    """Which time a vote's day is of. Clients choose when something occurred: trust that only for imported history."""
    together_answers: int = Field(3, ge=2)
    """Answers that two users must both have voted on before they can count as one voter…"""
    together_overlap: float = Field(0.3, gt=0, le=1)
    """…and the share of these among all answers that either of them voted on."""
    together_voters: int = Field(32, ge=2)
    """Voters of one answer that are held against each other; of more, so many are drawn."""
    burst_users: int = Field(20, ge=2)
    """A coordinated burst: this many users vote on one answer…"""
    burst_window_s: float = Field(60.0, gt=0)
    """…within this time."""
    drop_bursts: bool = True
    """Leave answers with a burst out; otherwise they are only counted."""


class ScoreSettings(Section):
    """The quality score, 0 to 1: a weighted mean of the components that exist."""

    explicit_weight: float = Field(0.40, ge=0)
    """Thumbs, ratings, corrections, drafts."""
    implicit_weight: float = Field(0.30, ge=0)
    """Copying, leaving, asking again."""
    complete_weight: float = Field(0.15, ge=0)
    """The answer has a usual length."""
    context_weight: float = Field(0.15, ge=0)
    """The answer uses the passages it was given."""
    grade_weight: float = Field(0.40, ge=0)
    """A grader's reward, where nobody gave explicit feedback."""
    complete_min_words: int = Field(50, ge=1)
    """Fewer words than this count proportionally less as complete."""
    complete_max_words: int = Field(500, ge=1)
    """More words than this count proportionally less as complete."""
    correction_score: float = Field(1.0, ge=0, le=1)
    """Score of an answer that a person wrote as a correction."""
    preferred_score: float = Field(0.9, gt=0.5, le=1)
    """Least score of an answer that a reviewer preferred to another; the other then has at most 1 minus this."""

    @model_validator(mode="after")
    def _check(self) -> "ScoreSettings":
        if self.complete_min_words > self.complete_max_words:
            raise ValueError("complete_min_words must be <= complete_max_words")
        if self.explicit_weight + self.implicit_weight + self.grade_weight <= 0:
            raise ValueError("one of explicit_weight, implicit_weight and grade_weight must be > 0")
        return self


class DetectorSettings(Section):
    """Which detectors judge texts; the defaults work offline."""

    support_overlap: float = Field(0.6, ge=0, le=1)
    """A sentence is supported when a passage holds this share of its content words, and all its numbers."""
    refusal_sentences: int = Field(3, ge=1)
    """Sentences at the beginning of an answer that are looked at for a refusal."""
    toxicity_model: str | None = None
    """Folder or hub id of a text classifier that judges toxicity instead of the shipped one."""
    toxicity_label: str = "toxic"
    """The label of that model that means yes."""
    refusal_model: str | None = None
    """Folder or hub id of a text classifier that judges refusals instead of the shipped one."""
    refusal_label: str = "refusal"
    """The label of that model that means yes."""
    grounding_model: str | None = None
    """Folder or hub id of an NLI cross-encoder that judges support instead of word overlap."""
    entailment_label: str = "entailment"
    """The label of that model that means a passage supports a claim."""
    similarity_model: str | None = None
    """Folder or hub id of a model of sentence embeddings that tells whether a user asked the same again, instead of
    character n-grams. `implicit.reformulation_similarity` is then a cosine of that model's: set it anew."""
    topic_model: str | None = None
    """Folder or hub id of a model of sentence embeddings in whose space topics are found, instead of TF-IDF's."""
    sentiment_model: str | None = None
    """Folder or hub id of a text classifier with the labels positive, neutral and negative, instead of VADER."""


class FilterSettings(Section):
    """What may not become an example."""

    min_answer_tokens: int = Field(10, ge=0)
    """Shortest answer, in tokens of the engine that made it."""
    max_answer_tokens: int = Field(1000, ge=1)
    """Longest answer, in tokens."""
    characters_per_token: float = Field(4.0, gt=0)
    """Estimate for answers that came without token ids."""
    allow_shadow: bool = False
    """Use answers that nobody saw."""
    toxicity: bool = True
    """Leave out answers that the toxicity detector marks."""
    ungrounded: bool = True
    """Leave out answers whose claims their passages do not support."""
    ungrounded_share: float = Field(0.5, ge=0, le=1)
    """An answer is ungrounded when more than this share of its sentences has no support."""
    refusal: bool = False
    """Leave out answers that decline what they were asked. Off: a refusal that people rate well is an example."""


class ScrubSettings(Section):
    """Personal data and secrets."""

    enabled: bool = True
    """Replace personal data by placeholders. Off only for data known to be clean."""
    domains: bool = True
    """Also replace bare host names."""
    names: Literal["off", "builtin", "presidio"] = "off"
    """Also replace names, places, addresses and dates: by shapes and short lists, or by presidio (an extra)."""
    presidio_model: str = Field("en_core_web_lg", min_length=1)
    """The spaCy model that presidio uses: the name of an installed one, or its folder. It is never downloaded."""
    entropy_bits: float = Field(4.0, gt=0)
    """A word of `entropy_characters` or more with this Shannon entropy a character looks like a secret;
    its row goes to quarantine."""
    entropy_characters: int = Field(32, ge=8)
    """Shortest word that is checked for entropy."""


class DeduplicationSettings(Section):
    """Exact and near duplicates."""

    shingle_words: int = Field(3, ge=1, le=20)
    """Words in a shingle."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of shingle sets from which two texts are near duplicates."""
    margin: float = Field(0.07, ge=0, le=1)
    """How far below the threshold the estimate from two sketches may lie. With the defaults, two of its standard
    errors: a pair at the threshold is found with probability 0.97."""
    bands: int = Field(20, ge=1, le=256)
    """LSH bands. With the defaults a pair at the threshold shares one with probability 0.998."""
    rows_per_band: int = Field(6, ge=1, le=32)
    """MinHash values in a band."""
    seed: int = Field(42, ge=0)
    """Of the MinHash permutations."""
    field_lines: int = Field(3, ge=1)
    """A text with this many `field: value` lines is a record: records are near duplicates only when all
    their fields agree."""
    bucket_pairs: int = Field(64, ge=2)
    """A bucket larger than this is compared along a chain instead of all against all."""
    keep_per_cluster: int = Field(1, ge=1)
    """Near-duplicate answers kept of each near-duplicate question, in a split."""


class ExampleSettings(Section):
    """What becomes of the rows that passed."""

    sft_min_score: float = Field(0.5, ge=0, le=1)
    """Score from which an answer may be imitated."""
    chosen_min_score: float = Field(0.7, ge=0, le=1)
    """Score that the chosen side of a pair needs."""
    min_margin: float = Field(0.2, ge=0, le=1)
    """Least difference of score between chosen and rejected."""
    pairs_per_question: int = Field(4, ge=0)
    """Pairs made from different answers to one question."""
    truncated_reasons: tuple[str, ...] = ("length",)
    """Finish reasons that mean an answer was cut off."""
    unpaired_corrections: bool = True
    """A correction's text also becomes a positive unpaired row."""
    sft_corrections: bool = True
    """A correction's text also becomes an SFT row."""


class BalanceSettings(Section):
    """Topics and augmentation."""

    topics: int = Field(0, ge=0, le=1000)
    """Topics that questions are clustered into by their words; 0 leaves them alone."""
    topic_sample: int = Field(20_000, ge=100)
    """Questions that the topics are found on; all others get the nearest."""
    topic_share: float = Field(0.5, gt=0, le=1)
    """Weights are scaled down so that no topic has more than this share."""


class AugmentSettings(Section):
    """Synthetic examples beside human ones, only in train and always marked."""

    enabled: bool = False
    """Add synthetic examples."""
    factor: float = Field(1.5, ge=1)
    """Examples in train afterwards, as a multiple of those before."""
    human_share: float = Field(0.3, gt=0, le=1)
    """Least share of human examples in train."""
    paraphrases: bool = True
    """Questions reworded by the stable version, with the same answer."""
    negatives: bool = True
    """Pairs of a good answer and a damaged copy of it."""
    endpoint: str = "http://127.0.0.1:8000"
    """The router that answers for the stable version."""
    model: str | None = None
    """Agent or version that rewords; the dataset's agent where absent."""
    api_key: str | None = None
    """Key for that router; from the environment or a secrets file."""
    timeout_s: float = Field(30.0, gt=0)
    """Longest wait for one rewording; a question that gets none is left as it is."""
    concurrency: int = Field(8, ge=1)
    """Rewordings under way at once, for each task."""

    @model_validator(mode="after")
    def _leaves_enough_human_data(self) -> "AugmentSettings":
        if 1 / self.factor < self.human_share:
            raise ValueError("factor must be <= 1 / human_share, so that enough human examples remain")
        return self


class SplitSettings(Section):
    """Train, validation and test, by user."""

    train: float = Field(0.8, gt=0, lt=1)
    """Share of users in train."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share of users in validation; the rest is test."""
    salt: str = "rayloop-split-1"
    """Key of the hash. Another salt is another split: earlier test users then appear in training, and
    only the stored sketches of test items keep them out."""

    @model_validator(mode="after")
    def _shares_leave_a_test(self) -> "SplitSettings":
        if self.train + self.validation >= 1:
            raise ValueError("train + validation must be < 1, so that a test split is left")
        return self


class EligibilitySettings(Section):
    """When a training may start."""

    positive_feedbacks: int = Field(100, ge=0)
    """Positive feedbacks needed in `window_days`."""
    window_days: float = Field(30.0, gt=0)
    """How far back feedback counts."""
    good_interactions: int = Field(50, ge=0)
    """Interactions with a score of at least `examples.chosen_min_score` needed."""
    rest_days: float = Field(7.0, ge=0)
    """Days since the last training of the agent."""
    whole_interactions: int = Field(1_000, ge=0)
    """Usable interactions needed to train the whole model, on the traffic of all agents."""
    pairs_for_dpo: int = Field(500, ge=0)
    """Preference pairs needed for DPO."""


class ArchetypeSettings(Section):
    """Groups of agents that are alike."""

    number: int = Field(0, ge=0, le=1000)
    """Archetypes to find; 0 chooses by the number of agents."""
    min_interactions: int = Field(20, ge=1)
    """Interactions from which an agent is looked at."""
    questions_per_agent: int = Field(2_000, ge=1)
    """Questions of each agent whose words count."""
    terms: int = Field(20, ge=1)
    """Terms that describe an archetype."""
    term_users: int = Field(3, ge=1, le=1000)
    """Users of an agent who must have used a term before it can describe an archetype."""
    reports_kept: int = Field(24, ge=1, le=1000)
    """Monthly reports that are kept, the newest."""


class CurationSettings(Section):
    """The curation pipeline."""

    weigh: WeighSettings = WeighSettings()
    detectors: DetectorSettings = DetectorSettings()
    score: ScoreSettings = ScoreSettings()
    filter: FilterSettings = FilterSettings()
    scrub: ScrubSettings = ScrubSettings()
    dedup: DeduplicationSettings = DeduplicationSettings()
    examples: ExampleSettings = ExampleSettings()
    balance: BalanceSettings = BalanceSettings()
    augment: AugmentSettings = AugmentSettings()
    split: SplitSettings = SplitSettings()
    eligibility: EligibilitySettings = EligibilitySettings()
    archetypes: ArchetypeSettings = ArchetypeSettings()
    whole_kept: int = Field(10_000, ge=0)
    """Interactions that a dataset of all agents keeps, the best and then the newest; 0 keeps all."""
    events_per_block: int = Field(50_000, ge=100)
    """Events that one task reads: few large blocks are faster than many small ones."""
    page_events: int = Field(2_000, ge=1)
    """Events in one read transaction."""
    stage_cpus: float = Field(0.5, gt=0)
    """Logical CPUs of one task on a cluster that runs already; fractions leave room for Serve on the same machine.
    On a cluster that curation starts for itself, a task has a core."""
    log_to_mlflow: bool = True
    """Log each dataset to MLflow, with its manifest, card and plots."""
    shard_rows: int = Field(50_000, ge=1)
    """Rows of one Parquet shard, about."""
