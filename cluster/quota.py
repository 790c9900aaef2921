"""What a tenant's trainings may use up in a while; beyond it none is started, by whatever way it comes."""

from cluster.clock import DAY_US, now_us
from cluster.errors import ConflictError
from cluster.jobs import Jobs
from cluster.settings import Settings

HOUR_S = 3600.0


def exceeded(settings: Settings, jobs: Jobs) -> str | None:
    """Which limit the tenant's trainings have reached, as a sentence; `None` while there is something left."""
    limits = settings.training.limits
    used = jobs.usage(now_us() - round(limits.usage_days * DAY_US))
    reached = (
        ("hours", used.run_s / HOUR_S, "max_training_hours", limits.max_training_hours),
        ("GPU-hours", used.gpu_s / HOUR_S, "max_gpu_hours", limits.max_gpu_hours),
    )
    for unit, spent, name, most in reached:
        if spent >= most:
            return (
                f"Tenant {jobs.tenant!r} has trained for {spent:.1f} {unit} in the last {limits.usage_days:g} days; "
                f"training.limits.{name} is {most:g}."
            )
    return None


def check_quota(settings: Settings, jobs: Jobs) -> None:
    """Refuse a training of a tenant that has used up what it may.

    Raises:
        ConflictError: it has.
    """
    message = exceeded(settings, jobs)
    if message is not None:
        raise ConflictError(f"{message} Wait, or raise the limit")
