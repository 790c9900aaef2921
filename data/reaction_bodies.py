"""The bodies of what came after an answer: feedback, behaviour, outcomes, grades."""

from typing import Literal

from pydantic import Field

from data.event_body import Body
from data.item_fields import Metadata, Modality, Tier

FeedbackType = Literal[
    "thumbs_up",
    "thumbs_down",
    "rating",
    "correction",
    "follow_up",
    "abandonment",
    "draft_approved",
    "draft_rejected",
    "reformulation",
    "quick_accept",
    "copy_response",
    "citation_click",
    "thorough_read",
    "abuse_flag",
    "policy_violation",
    "compliance_flag",
]


class Feedback(Body):
    """One signal about one interaction."""

    type: FeedbackType
    value: float | None = None
    """The rating, 1 to 5, where `type` is `rating`."""
    text: str | None = Field(None, max_length=100_000)
    """The better answer, where `type` is `correction`; else a comment."""
    category: Literal["factual", "style", "tone"] | None = None
    source: Literal["explicit", "implicit"] = "explicit"
    reward: float = Field(0.0, ge=-1, le=1)
    """Filled in by the server from the configured table, never by the client."""
    reason: str | None = Field(None, max_length=2_000)
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Behaviour(Body):
    """Something a user did after an answer, from which implicit signals are computed."""

    action: Literal["message", "copy", "citation_click", "read", "leave", "session_end"]
    duration_s: float | None = Field(None, ge=0)
    """For `read`: how long; for the others: time since the answer."""
    text: str | None = Field(None, max_length=100_000)
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Outcome(Body):
    """What a product measures itself."""

    name: str = Field(min_length=1, max_length=64)
    value: float
    modality: Modality | None = None
    user_tier: Tier | None = None
    metadata: Metadata | None = None


class Grade(Body):
    """A grader's verdict on one interaction."""

    grader: str
    grader_version: str
    reward: float | None = Field(None, ge=0, le=1)
    """`None` means the grader abstained."""
    score_card: dict[str, float] = Field({})
    reason: str | None = None
    judged: str | None = Field(None, max_length=128)
    """The event whose answer was judged; absent where the interaction is known by one report only."""
