"""Long silences of a job that lives: loading a model, a report on held-out feedback, a step that takes minutes.

Whoever starts another job marks those that have been silent for `training.job_silent_s` as lost. A thread says in the
job table that these are not, for as long as the process that does them is there.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from cluster.errors import RayloopError
from cluster.jobs import Jobs

log = logging.getLogger(__name__)

SIGNS_PER_SILENCE = 10  # so often within the time after which a job counts as lost


@contextmanager
def signs_of_life(jobs: Jobs, job_ids: Sequence[str], silent_s: float) -> Iterator[None]:
    """Keep jobs from counting as lost while the block runs; a database that is away is tried again."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(silent_s / SIGNS_PER_SILENCE):
            try:
                for job_id in job_ids:
                    jobs.beat(job_id)
            except (sa.exc.SQLAlchemyError, RayloopError) as error:
                log.warning("no sign of life of %s: %s", ", ".join(job_ids), str(error).splitlines()[0])

    thread = threading.Thread(target=work, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
