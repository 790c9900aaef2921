"""Fields that items of several kinds share."""

from typing import Annotated

from pydantic import Field

Short = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Short | int | float | bool], Field(max_length=16)]
"""What a client may attach to an item: at most 16 short values."""
Modality = Annotated[str, Field(min_length=1, max_length=16)]
"""`text`, `voice`, `sms`, or a word of your own; routes are keyed by it."""
Tier = Annotated[str, Field(min_length=1, max_length=64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SpanId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of the OpenTelemetry span an item was made from. `parent_span_id` names the nearest span above it that is an item
too, else the last one known: by these the parts of a trace find each other (`data.traces.join`)."""
