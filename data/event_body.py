"""What the bodies of all events have in common."""

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Base of all bodies: unknown fields and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
