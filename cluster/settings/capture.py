"""Event intake, feedback rewards and retention (capture.md)."""

from pydantic import Field

from cluster.settings.base import Section


class LogSettings(Section):
    """The event log."""

    group_commit_events: int = Field(256, ge=1)
    """A group commit is written when this many events wait."""
    group_commit_ms: float = Field(2.0, ge=0)
    """…or when the oldest waiting event is this old."""
    group_commit_max_events: int = Field(4096, ge=1)
    """Events in one transaction at most, when they come faster than they are written."""
    queue_events: int = Field(20_000, ge=1)
    """Events that may wait for a commit; beyond it intake answers 429."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a 429 tells the client to wait."""
    retry_for_s: float = Field(10.0, gt=0)
    """How long a failed commit is tried again before its events are refused."""
    event_id_window_days: int = Field(30, ge=1)
    """How long an `event_id` is remembered for idempotency."""
    lineage_sample: int = Field(5, ge=0)
    """Interactions and feedback events that `rayloop lineage` names; all are counted."""
    verify_page_events: int = Field(1000, ge=1)
    """Events that `rayloop verify` reads at a time."""
    verify_shown_faults: int = Field(100, ge=1)
    """Faults that `rayloop verify` names; all are counted."""


class SealSettings(Section):
    """Finished days of the log as Parquet at `storage.events`."""

    keep_days: float = Field(7.0, ge=0)
    """Days that bodies stay in the database after they were sealed."""
    partition_events: int = Field(1_000_000, ge=1)
    """Events of the log that are sealed at a time, so events of one file at most."""
    page_events: int = Field(4096, ge=1)
    """Events read at a time, and events of one row group."""


class ErasureSettings(Section):
    """How a person is erased."""

    rewrite_tables: bool = True
    """Rewrite PostgreSQL's tables afterwards, so that no deleted row stays in a page. It locks each table;
    off means that deleted rows stay in free space until it is used again."""
    overwrite_wal_mb: int = Field(1024, ge=0, le=65_536)
    """How much of PostgreSQL's write-ahead log is written over afterwards, at most: the segments that the server put
    aside for reuse keep what is in them until then."""
    wait_s: float = Field(60.0, ge=0)
    """How long to wait for a seal or another erasure, and for readers of SQLite's write-ahead log."""


class IntakeSettings(Section):
    """What comes in over HTTP or from a file."""

    max_items: int = Field(1000, ge=1)
    """Items in one body."""
    future_tolerance_s: float = Field(60.0, ge=0)
    """How far ahead of our clock an item's time may lie."""
    max_text_chars: int = Field(100_000, ge=1, le=1_000_000)
    """Longest text of one item: a correction, a comment, one message."""
    import_batch_events: int = Field(2000, ge=1)
    """Events in one transaction of an import."""
    shown_problems: int = Field(20, ge=0)
    """Rejected rows that an import prints; `--rejects` keeps all of them."""
    shown_value_chars: int = Field(120, ge=10)
    """Characters of a refused value that are shown."""


class RewardSettings(Section):
    """What each signal is worth, in [-1, 1]. Implicit ones are summed an interaction and clamped."""

    thumbs_up: float = Field(1.0, ge=-1, le=1)
    """The user liked the answer."""
    thumbs_down: float = Field(-1.0, ge=-1, le=1)
    """The user disliked it."""
    rating_neutral: float = Field(3.0, ge=1, le=5)
    """The rating, of 1 to 5, that is worth nothing."""
    rating_step: float = Field(0.5, gt=0, le=1)
    """What each point above or below neutral is worth."""
    correction: float = Field(-0.5, ge=-1, le=1)
    """The user wrote a better answer."""
    follow_up: float = Field(0.0, ge=-1, le=1)
    """The user asked on."""
    abandonment: float = Field(-0.8, ge=-1, le=1)
    """The user left without an answer they could use."""
    draft_approved: float = Field(1.0, ge=-1, le=1)
    """A reviewer let the draft pass."""
    draft_rejected: float = Field(-1.0, ge=-1, le=1)
    """A reviewer stopped the draft."""
    reformulation: float = Field(-0.5, ge=-1, le=1)
    """The user asked the same again."""
    quick_accept: float = Field(0.6, ge=-1, le=1)
    """The user acted on the answer at once."""
    copy_response: float = Field(0.4, ge=-1, le=1)
    """The user copied the answer."""
    citation_click: float = Field(0.3, ge=-1, le=1)
    """The user opened one source; each counts."""
    thorough_read: float = Field(0.5, ge=-1, le=1)
    """The user read for most of the expected time."""
    abuse_flag: float = Field(-1.0, ge=-1, le=1)
    """The answer was reported as abusive."""
    policy_violation: float = Field(-1.0, ge=-1, le=1)
    """The answer broke a policy."""
    compliance_flag: float = Field(-1.0, ge=-1, le=1)
    """The answer broke a rule of law or regulation."""


class ImplicitSettings(Section):
    """How behaviour becomes implicit signals."""

    words_per_minute: float = Field(238.0, gt=0)
    """Reading speed (silent reading of English non-fiction, Brysbaert 2019)."""
    thorough_read_share: float = Field(0.8, gt=0, le=1)
    """Share of the expected reading time that counts as a thorough read."""
    abandonment_share: float = Field(0.5, gt=0, le=1)
    """Leaving before this share of the expected reading time can be an abandonment."""
    quick_accept_s: float = Field(3.0, gt=0)
    """Acting on the answer within this time is a quick accept."""
    min_session_s: float = Field(10.0, ge=0)
    """A shorter session gives no accept or read signals."""
    session_idle_min: float = Field(30.0, gt=0)
    """A session ends after this many idle minutes."""
    reformulation_similarity: float = Field(0.5, gt=0, le=1)
    """Similarity of two consecutive user turns from which the second asks the same again."""


class CalibrationSettings(Section):
    """How the weights of implicit signals are held against what the same people said."""

    apply: bool = True
    """Curation uses the fitted weight of a signal in place of the configured one where the two surely differ, and
    the dataset's card says so; `false`: only `rayloop data calibration` reports it."""

    prior_rows: float = Field(10.0, gt=0)
    """How many observations the configured weight counts for."""
    min_rows: int = Field(30, ge=2)
    """A signal with fewer interactions is reported, but no other weight is proposed for it."""
    max_rows: int = Field(200_000, ge=100)
    """Curation calibrates on at most so many interactions, chosen by the hash of their ids."""


class AuditSettings(Section):
    """How `rayloop audit` describes a file."""

    max_distinct: int = Field(10_000, ge=10)
    """Distinct values that are counted in one column; a column with more is called `many`."""
    max_label_values: int = Field(10, ge=2)
    """A column with more distinct values is no label."""
    min_label_repeats: int = Field(5, ge=1)
    """How often a label's values occur on average, at least."""
    min_relation_values: int = Field(3, ge=1)
    """Columns with fewer distinct values are not compared between files."""
    relation_share: float = Field(0.5, gt=0, le=1)
    """Share of the smaller column's values that must occur in the other."""
    baseline_rows: int = Field(5_000, ge=10)
    """Rows, from the start of the file, that the baselines are measured on."""
    baseline_folds: int = Field(5, ge=2)
    """Folds of the cross-validation."""
