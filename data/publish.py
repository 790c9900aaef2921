"""The last step of curation: a dataset that a training can use, of people who are still here, gets its name."""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.engine import Engine

from cluster.database import exclusive
from cluster.errors import ConflictError, DatasetError
from cluster.settings import Settings
from data import manifest
from data.erasure.person import PUBLISH, erased_users
from data.events import Event
from data.log import EventLog
from data.manifest import Manifest


def check_usable(
    counts: dict[str, dict[str, int]], labels: set[bool], dropped: Sequence[tuple[str, dict[str, int]]]
) -> None:
    """Refuse a dataset that no training could learn a difference from.

    Raises:
        DatasetError: no examples, or all feedback points the same way; says what became of the rows.
    """
    totals = {kind: sum(splits.values()) for kind, splits in counts.items()}
    if sum(totals.values()) == 0:
        reasons = [f"{stage}: {reason} {n}" for stage, found in dropped for reason, n in found.items()]
        raise DatasetError(f"no examples could be made ({'; '.join(reasons) or 'no interactions'})")
    if totals["preference"] == 0 and len(labels) == 1:
        side = "positive" if labels == {True} else "negative"
        raise DatasetError(
            f"all feedback is {side} ({totals['unpaired']} judged answers, no preference pair): one-sided "
            "feedback teaches no difference; collect the other side, or corrections"
        )
    if totals["preference"] == 0 and not labels and totals["sft"] == 0:
        raise DatasetError("no answer is good enough to imitate and none is preferred to another")


def publish(
    engine: Engine, settings: Settings, erased: frozenset[str], building: Path, root: Path, made: Manifest
) -> Manifest:
    """Give a dataset its name and tell of it, unless somebody was erased since the log was read."""
    with exclusive(engine, PUBLISH, settings.erasure.wait_s):
        if erased_users(engine, settings.tenant) != erased:
            raise ConflictError("somebody was erased while this dataset was made; run `rayloop curate` again")
        return _named(engine, building, root, made)


def publish_upload(engine: Engine, settings: Settings, building: Path, root: Path, made: Manifest) -> Manifest:
    """The same for a dataset of files that a client sent.

    An erasure that looks for datasets meanwhile finds it announced, or waits until it is. Nobody of the log is in
    it, so who was erased since does not make it out of date.

    Raises:
        ConflictError: an erasure looks for datasets for longer than `erasure.wait_s`.
    """
    with exclusive(engine, PUBLISH, settings.erasure.wait_s):
        return _named(engine, building, root, made)


def _named(engine: Engine, building: Path, root: Path, made: Manifest) -> Manifest:
    written = manifest.publish(building, root, made)
    EventLog(engine).append([ready_event(written)])
    return written


def ready_event(written: Manifest) -> Event:
    """`dataset.ready`, once for each dataset however often it is made."""
    body = {
        "dataset_id": written.dataset_id,
        "dataset_hash": written.dataset_hash,
        "path": written.path,
        "counts": written.counts,
    }
    return Event(
        "dataset.ready",
        written.tenant,
        written.workspace,
        body,
        event_id=f"dataset.ready:{written.workspace}:{written.dataset_id}",
        agent=written.agent,
    )
