"""Every table of the database; the migrations create exactly these (a test compares).

The event log is the source of truth. `routes`, `agent_prompts` and `servables` hold what the live side should do. The
rest are projections of the log and can be rebuilt.
"""

from cluster.tables.experiments import (
    MOMENT_COLUMNS,
    arm_histograms,
    arm_history,
    arm_moments,
    arm_statistics,
    experiment_arms,
    experiment_users,
    experiments,
    rollouts,
    user_baselines,
)
from cluster.tables.live import (
    agent_prompts,
    api_keys,
    key_usage,
    router_configs,
    router_replicas,
    routes,
    servable_replicas,
    servables,
)
from cluster.tables.log import cursors, erasures, event_bodies, event_ids, events, partitions, tombstones
from cluster.tables.schema import Sequence64, metadata
from cluster.tables.services import dead_letters, judged_answers, leases, outlets, tool_replies
from cluster.tables.training import job_events, training_jobs, uploaded_files

__all__ = [
    "MOMENT_COLUMNS",
    "Sequence64",
    "agent_prompts",
    "api_keys",
    "arm_histograms",
    "arm_history",
    "arm_moments",
    "arm_statistics",
    "cursors",
    "dead_letters",
    "erasures",
    "event_bodies",
    "event_ids",
    "events",
    "experiment_arms",
    "experiment_users",
    "experiments",
    "job_events",
    "judged_answers",
    "key_usage",
    "leases",
    "metadata",
    "outlets",
    "partitions",
    "rollouts",
    "router_configs",
    "router_replicas",
    "routes",
    "servable_replicas",
    "servables",
    "tombstones",
    "tool_replies",
    "training_jobs",
    "uploaded_files",
    "user_baselines",
]
