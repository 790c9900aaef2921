"""Of several processes that could fill the labelling queue, one does."""

from sqlalchemy.engine import Engine

from cluster.clock import now_us
from cluster.lease import lease_holder
from cluster.settings import Settings
from data.labelling.queue import LabelQueue
from data.log import EventLog
from serve.labelling_loop import LEASE, LabellingLoop
from tests.data.labelling.test_sampling import answer


def test_one_of_two_loops_draws_and_hands_over_when_it_ends(settings: Settings, sqlite_database: Engine) -> None:
    on = settings.model_copy(update={"learning": settings.learning.model_copy(update={"enabled": True})})
    log = EventLog(sqlite_database)
    log.append([answer(1)])
    first, second = LabellingLoop(on), LabellingLoop(on)
    assert first.draw() == 1
    log.append([answer(2)])
    assert second.draw() == 0
    first.stop()
    first.run()  # ends at once, and gives the lease back
    assert lease_holder(sqlite_database, LEASE, now_us()) is None
    assert second.draw() == 1
    assert len(LabelQueue(sqlite_database, on.labelling).waiting("default", "default")) == 2
    second.stop()
    second.run()


def test_with_learning_off_nothing_is_drawn(settings: Settings, sqlite_database: Engine) -> None:
    EventLog(sqlite_database).append([answer(1)])
    assert LabellingLoop(settings).draw() == 0
