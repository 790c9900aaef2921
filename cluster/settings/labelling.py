"""What people are asked to label (people.md)."""

from pydantic import Field, model_validator

from cluster.settings.base import Section


class LabellingSettings(Section):
    """The queue of answers that people judge."""

    per_day: int = Field(40, ge=1, le=1000)
    """Items a tenant's workspace gets a day, evaluations not counted: they are asked for on purpose."""
    uncertainty_share: float = Field(0.3, ge=0, le=1)
    """Share of them for answers that the model itself was least sure of."""
    spot_check_share: float = Field(0.2, ge=0, le=1)
    """Share of them for answers drawn at random; the rest is for pairs that disagree."""
    overlap_share: float = Field(0.1, ge=0, le=1)
    """Share of the items that two people judge, so that their agreement can be told."""
    keep_days: float = Field(14.0, gt=0, le=365)
    """An item that nobody judged for so long leaves the queue."""
    sampled_events: int = Field(5000, ge=100)
    """Events of the last day, drawn at random, among which uncertain answers and spot checks are looked for."""
    sample_every_s: float = Field(600.0, gt=0)
    """How often the live side looks for such answers."""
    page_events: int = Field(1000, ge=1)
    """Events read at a time."""
    shown_items: int = Field(20, ge=1, le=200)
    """Items a reviewer gets at a time where they name no number."""

    @model_validator(mode="after")
    def _shares_leave_room(self) -> "LabellingSettings":
        if self.uncertainty_share + self.spot_check_share > 1:
            raise ValueError("uncertainty_share and spot_check_share are more than 1 together; lower one")
        return self
