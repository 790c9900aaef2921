"""The base of every section: frozen, no unknown fields, docstrings as descriptions."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings under one key of `rayloop.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
