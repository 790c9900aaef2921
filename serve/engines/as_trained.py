"""Whether an engine serves what was trained: its log-probs of a few tokens against those of the training."""

import math
from collections.abc import Sequence

from serve.engines.adapter_source import AdapterError


def check_as_trained(served: Sequence[float], trained: Sequence[float], most: float) -> float:
    """The mean distance in nats a token; 0 where the training wrote nothing down.

    Raises:
        AdapterError: it is above `most`, or not a number: another adapter, base or scale than was trained.
    """
    if not trained:
        return 0.0
    distance = math.fsum(abs(ours - theirs) for ours, theirs in zip(served, trained, strict=True)) / len(trained)
    if not distance <= most:
        raise AdapterError(
            f"it is not as it was trained: log-probs of its canary texts are {distance:.2g} nats a token from what "
            f"its training wrote down, {most:.2g} are allowed (`engine.canary_max_distance`)"
        )
    return distance
