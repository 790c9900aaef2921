"""What models said of an answer, kept in the database.

A judge asked twice may say two things. The first grade under a grader's version stands: whoever is first
writes it, everybody else reads it. Keys are digests under the installation's secret, so an answer cannot be
guessed back from them; the rows hold rewards and scores, no text of anybody.
"""

import hmac
import logging
from hashlib import sha256

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.clock import SECOND_US, now_us
from cluster.database import write
from cluster.tables import judged_answers
from data.grading.types import GradeResult, Item, RawSample

log = logging.getLogger(__name__)

DAY_S = 86_400


class JudgedAnswers:
    """The table of grades by models. Thread-safe."""

    def __init__(self, database: Engine, secret: bytes, keep_days: float) -> None:
        self._database, self._secret, self._keep_days = database, secret, keep_days

    def key(self, version: str, item: Item, sample: RawSample) -> str:
        """The key of an answer under a grader's version."""
        return hmac.new(self._secret, input_digest(version, item, sample), sha256).hexdigest()

    def find(self, key: str) -> GradeResult | None:
        """What was said before; `None` where nobody was asked."""
        query = sa.select(judged_answers).where(judged_answers.c.key == key)
        with self._database.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        return GradeResult(row["reward"], dict(row["scores"]), row["reason"], row["grader_version"])

    def keep(self, key: str, result: GradeResult) -> GradeResult:
        """Keep a grade, unless another one is kept already; the one that stands."""
        row = {
            "key": key,
            "grader_version": result.grader_version,
            "reward": result.reward,
            "scores": result.score_card,
            "reason": result.reason[:200],
            "judged_at_us": now_us(),
        }
        try:
            with write(self._database).begin() as connection:
                connection.execute(judged_answers.insert().values(**row))
        except sa.exc.IntegrityError:
            return self.find(key) or result
        return result

    def forget_old(self) -> int:
        """Delete what is older than is kept; how many."""
        before = now_us() - round(self._keep_days * DAY_S * SECOND_US)
        with write(self._database).begin() as connection:
            old = judged_answers.delete().where(judged_answers.c.judged_at_us < before)
            return int(connection.execute(old).rowcount)


def input_digest(version: str, item: Item, sample: RawSample) -> bytes:
    """SHA-256 of a grader's version and its input."""
    text = orjson.dumps([version, item, sample], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return sha256(text).digest()
