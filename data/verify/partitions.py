"""Checks sealed partitions: file, rows and log say the same, and both have the Merkle root of the seal.

File and log are read side by side and matched by event id with a look at the next record, so one that is too
much or too little on either side is named and the rest still matches. The roots then tell which of the two was
tampered with, for neither can be changed without its root changing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import RayloopError
from cluster.settings import Settings
from cluster.tables import events
from data.encoding import body_digest, event_digest
from data.log import EventLog, recorded_event
from data.partitions.files import hash_file, read_batches
from data.partitions.merkle import MerkleTree
from data.partitions.partition import Partition, read_partitions
from data.verify.report import VerifyReport

Row = dict[str, Any]
ENVELOPE = (
    "event_id",
    "kind",
    "tenant",
    "workspace",
    "occurred_at_us",
    "recorded_at_us",
    "user_id",
    "session_id",
    "agent",
    "interaction_id",
    "erased",
    "digest",
    "body_digest",
)
"""What the file and the log both hold of a record."""


def check_partitions(engine: Engine, settings: Settings, report: VerifyReport) -> None:
    """Read every sealed partition against the log and against what was recorded when it was sealed."""
    with engine.connect() as connection:
        known = read_partitions(connection)
    announced, complete = _announced(engine, report)
    shifts = {0}
    for partition in known:
        said = announced.pop((partition.after_seq, partition.day), None)
        if said is None and complete:
            report.add(None, f"partition {partition.name}: the log does not say that it was sealed")
        elif said is not None and (said["root"], said["num_events"]) != (
            partition.root,
            partition.num_events,
        ):
            report.add(None, f"partition {partition.name}: its root or count is not the one in the log")
        _Sides(engine, partition, settings.seal.page_events, report, shifts).check()
        report.partitions += 1
    for after_seq, day in announced:
        report.add(None, f"partition {day} after seq {after_seq} was sealed and is no longer registered")


def _announced(engine: Engine, report: VerifyReport) -> tuple[dict[tuple[int, str], Row], bool]:
    """What the log says about each seal, and whether all of the log could be read."""
    found: dict[tuple[int, str], Row] = {}
    try:
        for recorded in EventLog(engine).scan(kinds=["partition.sealed"]):
            body = recorded.event.body
            if body:
                found[body["after_seq"], body["day"]] = body
    except RayloopError as error:
        report.add(None, f"what the log says about seals cannot be read: {error}")
        return found, False
    return found, True


class _Peekable:
    """Rows with a look at the next one."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self.head = next(rows, None)
        self.following = next(rows, None)

    def advance(self) -> None:
        self.head, self.following = self.following, next(self._rows, None)


@dataclass
class _Sides:
    """One partition, read from its file and from the database."""

    engine: Engine
    partition: Partition
    page: int
    report: VerifyReport
    shifts: set[int]
    """By how much records of the log were found renumbered; each is told once."""
    file_tree: MerkleTree = field(default_factory=MerkleTree)
    log_tree: MerkleTree = field(default_factory=MerkleTree)
    not_filed: dict[str, int] = field(default_factory=dict)
    """`seq` by event id of what only the log has shown so far."""
    not_logged: dict[str, int] = field(default_factory=dict)
    """The same of what only the file has shown."""
    last_seq: int = 0
    """Of the last record both have."""

    def check(self) -> None:
        try:
            self._check_file()
            self._compare()
        except (RayloopError, OSError) as error:
            self._about(None, str(error).splitlines()[0])
            return
        for event_id, seq in self.not_filed.items():
            self._about(seq, f"event {event_id!r} is in the log and not in the file")
        for event_id, seq in self.not_logged.items():
            self._about(seq, f"event {event_id!r} is in the file and not in the log")
        self._check_roots()

    def _check_file(self) -> None:
        found, _ = hash_file(self.partition.location, self.partition.path)
        if found != self.partition.sha256:
            self._about(None, f"the file {self.partition.path} is not the one that was sealed")

    def _compare(self) -> None:
        filed, logged = _Peekable(self._filed()), _Peekable(self._logged())
        while filed.head is not None or logged.head is not None:
            row, expected = filed.head, logged.head
            if row is None or (expected is not None and _is_surplus(expected, row, logged.following, filed.following)):
                assert expected is not None
                self._only_logged(expected)
                logged.advance()
            elif expected is None or _is_surplus(row, expected, filed.following, logged.following):
                self._only_filed(row)
                filed.advance()
            else:
                self._check_same(row, expected)
                filed.advance()
                logged.advance()

    def _only_logged(self, expected: Row) -> None:
        if self.not_logged.pop(expected["event_id"], None) is not None:
            self._about(expected["seq"], f"event {expected['event_id']!r} stands out of order")
        elif len(self.not_filed) < self.report.shown:
            self.not_filed[expected["event_id"]] = expected["seq"]
        else:
            self._about(expected["seq"], f"event {expected['event_id']!r} is in the log and not in the file")

    def _only_filed(self, row: Row) -> None:
        if self.not_filed.pop(row["event_id"], None) is not None:
            self._about(row["seq"], f"event {row['event_id']!r} stands out of order")
        elif row["seq"] == self.last_seq:
            self._about(row["seq"], f"event {row['event_id']!r} stands twice in the file")
        elif len(self.not_logged) < self.report.shown:
            self.not_logged[row["event_id"]] = row["seq"]
        else:
            self._about(row["seq"], f"event {row['event_id']!r} is in the file and not in the log")

    def _check_same(self, row: Row, expected: Row) -> None:
        self.last_seq = row["seq"]
        shift = expected["seq"] - row["seq"]
        if shift not in self.shifts:
            self.shifts.add(shift)
            self._about(row["seq"], f"event {row['event_id']!r} is seq {expected['seq']} in the log")
        differing = [name for name in ENVELOPE if row[name] != expected[name]]
        if differing:
            self._about(row["seq"], f"event {row['event_id']!r}: file and log differ in {', '.join(differing)}")

    def _check_digest(self, row: Row) -> None:
        """Whether the row's digest fits what the file holds of it."""
        recorded = recorded_event(row, body={})
        if row["erased"]:
            of_body = row["body_digest"]
        elif row["body"] is None:
            self._about(row["seq"], f"event {row['event_id']!r}: its body is missing from the file")
            return
        else:
            of_body = body_digest(row["salt"] or b"", recorded.event, row["body"].encode(), row["arrays"])
        found = event_digest(recorded.seq, recorded.recorded_at_us, recorded.event, of_body or b"")
        if found != recorded.digest:
            self._about(row["seq"], f"event {row['event_id']!r}: altered in the file: its digest does not fit")

    def _check_roots(self) -> None:
        sides = {"file": self.file_tree, "log": self.log_tree}
        wrong = [name for name, tree in sides.items() if tree.root().hex() != self.partition.root]
        if wrong:
            self._about(None, f"the records of the {' and of the '.join(wrong)} do not have its Merkle root")

    def _filed(self) -> Iterator[Row]:
        for batch in read_batches(self.partition):
            for row in batch.to_pylist():
                self.file_tree.add(row["digest"])
                self._check_digest(row)
                yield row

    def _logged(self) -> Iterator[Row]:
        query = sa.select(events).where(self.partition.holds()).order_by(events.c.seq).limit(self.page)
        after = self.partition.after_seq
        while True:
            with self.engine.connect() as connection:
                rows = connection.execute(query.where(events.c.seq > after)).mappings().all()
            if not rows:
                return
            for row in rows:
                self.log_tree.add(bytes(row["digest"]))
                yield dict(row)
            after = rows[-1]["seq"]

    def _about(self, seq: int | None, what: str) -> None:
        self.report.add(seq, f"partition {self.partition.name}: {what}")


def _is_surplus(row: Row, other: Row, following: Row | None, other_following: Row | None) -> bool:
    """Whether `row` is one that the other side does not have here."""
    if row["event_id"] == other["event_id"]:
        return False
    if following is not None and following["event_id"] == other["event_id"]:
        return True
    matches_later = other_following is not None and other_following["event_id"] == row["event_id"]
    return not matches_later and bool(row["seq"] < other["seq"])
