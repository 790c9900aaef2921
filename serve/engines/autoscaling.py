"""How many replicas an engine has: a fixed number, as many as requests ask for, or none while nobody asks."""

from typing import Any

from cluster.settings.engines import EngineSettings
from serve.applications.document import is_ours


def may_idle(engine: EngineSettings) -> bool:
    """Whether the engine may have no replica while nobody asks it anything."""
    allowed = engine.autoscaling.scale_to_zero
    return allowed == "always" or (allowed == "candidates" and is_ours(engine.name))


def scale(engine: EngineSettings) -> dict[str, Any]:
    """How many replicas, as options of a Serve deployment.

    It starts with `engine.replicas`, idle-able or not: what is to be served is loaded and checked before anybody asks.
    """
    autoscaling = engine.autoscaling
    if autoscaling.max_replicas is None and not may_idle(engine):
        return {"num_replicas": engine.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": 0 if may_idle(engine) else engine.replicas,
            "initial_replicas": engine.replicas,
            "max_replicas": autoscaling.max_replicas or engine.replicas,
            "target_ongoing_requests": autoscaling.target_requests,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
            "downscale_to_zero_delay_s": autoscaling.idle_s,
            "look_back_period_s": autoscaling.look_back_s,
        }
    }
