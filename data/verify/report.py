"""What a check of the log found: its faults, counted and in words."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    seq: int | None
    """Where; `None` for an id whose event is gone, or a whole partition."""
    what: str


@dataclass(slots=True)
class VerifyReport:
    """What a check of the log found."""

    shown: int
    """How many faults are kept in words; all are counted."""
    events: int = 0
    erased: int = 0
    partitions: int = 0
    fault_count: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, seq: int | None, what: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < self.shown:
            self.faults.append(Fault(seq, what))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "events": self.events,
            "erased": self.erased,
            "partitions": self.partitions,
            "fault_count": self.fault_count,
            "faults": [{"seq": f.seq, "what": f.what} for f in self.faults],
        }
