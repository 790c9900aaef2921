"""What the command does with what workers say, when MLflow, the database or a person comes in between."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import stamina

from cluster.database import connect
from cluster.errors import ConflictError, UnavailableError
from cluster.jobs import Jobs
from cluster.settings import Settings
from train.callbacks import Pace
from train.config import TrainConfig
from train.jobs import Record, take_patiently
from train.mailbox import Event, Mailbox, emptied_regularly
from train.plan import Planned

STEP = Event(0, "progress", step=3, steps=10, values={"loss": 0.5})


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mailbox that is asked as an actor is."""
    box = Mailbox()
    monkeypatch.setattr("ray.get", lambda told: told)
    monkeypatch.setattr("ray.kill", lambda _: None)
    return SimpleNamespace(take=SimpleNamespace(remote=box.take), put=box.put)


def test_what_the_command_refuses_to_hear_ends_the_workers_and_is_raised(mailbox: Any) -> None:
    stopped = threading.Event()

    def refuse(event: Event) -> None:
        raise ConflictError("job 'x' is cancelled, not running")

    mailbox.put([STEP])
    with pytest.raises(ConflictError, match="is cancelled"), emptied_regularly(mailbox, refuse, stopped.set):
        assert stopped.wait(20)
        raise UnavailableError("training workers failed: the actor died")  # as `fit` ends once it has been stopped


def test_last_events_are_handed_over_when_the_block_ends(mailbox: Any) -> None:
    heard: list[Event] = []
    with emptied_regularly(mailbox, heard.append, lambda: None):
        mailbox.put([STEP])
    assert heard == [STEP]


class Flaky:
    """A record that fails a few times before it takes an event."""

    run = SimpleNamespace(job_id="sft-1")

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.taken = list(errors), list[Event]()

    def take(self, event: Event) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(event)


LOCKED = sa.exc.OperationalError("UPDATE training_jobs", {}, Exception("database is locked"))


def test_a_step_may_be_missed_but_not_that_a_run_ended(caplog: pytest.LogCaptureFixture) -> None:
    steps, ends = Flaky(LOCKED), Flaky(LOCKED, UnavailableError("MLflow does not answer"))
    end = Event(0, "end", result={})
    with stamina.set_testing(True, attempts=8, cap=True):  # type: ignore[attr-defined]
        for event in (STEP, STEP):
            take_patiently(steps, event)  # type: ignore[arg-type]
        take_patiently(ends, end)  # type: ignore[arg-type]
    assert (steps.taken, ends.taken) == ([STEP], [end])
    assert "step 3 of sft-1 is not recorded: " in caplog.text
    for kind in ("progress", "end"):
        with pytest.raises(ConflictError):
            take_patiently(Flaky(ConflictError("cancelled")), Event(0, kind, result={}))  # type: ignore[arg-type]


def test_run_that_was_cancelled_elsewhere_stops_when_it_next_reports(settings: Settings, tmp_path: Path) -> None:
    database = connect(settings)
    jobs = Jobs(database, settings.tenant, settings.workspace)
    config = TrainConfig(
        method="sft", base_model="o/m", dataset=tmp_path, out=tmp_path / "out", learning_rate=1e-4, epochs=1
    )
    record = Record(settings, jobs, Planned("sft-1", config, "", asked=True), None, "create")  # type: ignore[arg-type]
    jobs.create("sft", job_id="sft-1")
    jobs.start("sft-1")
    record.bar = SimpleNamespace(reached=lambda *_: None, beat=lambda: True)  # type: ignore[assignment]
    take_patiently(record, STEP)
    jobs.cancel("sft-1")
    with pytest.raises(ConflictError, match="is cancelled"):
        take_patiently(record, STEP)
    database.dispose()


def test_pace_by_hand() -> None:
    pace = Pace()
    assert pace.of(10, 30, 1000.0, 100.0) == {}
    assert pace.of(11, 30, 1400.0, 102.0) == {"eta_s": 38.0, "tokens_per_s": 200.0}
    assert pace.of(12, 30, None, 103.0) == {"eta_s": 27.0}  # an entry without tokens, as of validation
    assert pace.of(12, 30, 1600.0, 104.0) == {"eta_s": 36.0, "tokens_per_s": 100.0}
