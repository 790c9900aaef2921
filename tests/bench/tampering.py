"""One tampered record among a hundred thousand: does `rayloop verify` name it?

    python -m tests.bench.tampering [--events 100000]

Half of the log is sealed, its bodies have left the database; the other half is open. Each way of tampering
(`tests/data/verify/tampers.py`) is tried on one record of either half, or of a sealed file, on SQLite. Printed: the
first fault and the number of faults, the time of a clean check, and the most memory the process ever held.
"""

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.database import connect
from cluster.settings import load_settings
from data.log import EventLog
from data.seal import seal
from data.verify.report import VerifyReport
from data.verify.run import verify_log
from tests.data.days import asked, at, said
from tests.data.verify import tampers

BATCH = 2000


def fill(log: EventLog, events: int, day: int, first: int) -> None:
    """Interactions and feedback of one day."""
    for start in range(first, first + events // 2, BATCH):
        numbers = range(start, min(start + BATCH, first + events // 2))
        log.append(
            [e for n in numbers for e in (asked(f"i{n}", day, user=f"u{n % 997}"), said(f"f{n}", day, about=f"i{n}"))]
        )


def line(name: str, report: VerifyReport, victim: int, note: str = "") -> bool:
    """Print what was found; true when a fault is at the victim or beside it."""
    near = [f for f in report.faults if f.seq is not None and abs(f.seq - victim) <= 1]
    found = bool(near) or bool(note)
    shown = f"seq {near[0].seq}: {near[0].what}" if near else note or "NOT NAMED"
    print(f"{name:<28} {report.fault_count:>3} faults  {shown}"[:170], flush=True)
    return found


def main() -> int:
    """All of them; 1 if one was not named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=100_000)
    half = parser.parse_args().events // 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clean, used = folder / "clean.db", folder / "used.db"
        options: dict[str, Any] = {"home": folder / "home", "seal": {"keep_days": 0}}
        settings = load_settings(database={"url": f"sqlite:///{clean}"}, **options)[0]
        engine = connect(settings)
        fill(EventLog(engine), half, 0, 0)
        seal(engine, settings, at(1))
        fill(EventLog(engine), half, 2, half)
        started = time.perf_counter()
        report = verify_log(engine, settings)
        seconds = time.perf_counter() - started
        print(f"clean: {report.events} events, {report.fault_count} faults, {seconds:.1f} s", flush=True)
        good = report.fault_count == 0
        engine.dispose()
        for where, victim in (("sealed", half // 2 + 1), ("open", half + half // 2 + 1)):
            for tamper in tampers.IN_DATABASE:
                shutil.copy(clean, used)
                engine = connect(load_settings(database={"url": f"sqlite:///{used}"}, **options)[0], migrate=False)
                with engine.begin() as connection:
                    tamper(connection, victim)
                harmless = where == "sealed" and tamper in tampers.OF_BODIES
                note = "the body is in the file, nothing to tamper with" if harmless else ""
                good &= line(f"{where} {tamper.__name__}", verify_log(engine, settings), victim, note)
                engine.dispose()
        good &= tamper_with_files(connect(settings), settings, half // 2 + 1)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"most memory held: {peak_mb} MB")
    return 0 if good else 1


def tamper_with_files(engine: Any, settings: Any, victim: int) -> bool:
    """Each way of tampering with a sealed file, put back in between."""
    good = True
    partition = tampers.partition_of(engine, victim)
    path = Path(partition.location, partition.path)
    content = path.read_bytes()
    for tamper in tampers.IN_FILE:
        tampers.tamper_with_file(partition, tamper, victim)
        good &= line(f"file {tamper.__name__}", verify_log(engine, settings), victim)
        path.write_bytes(content)
    engine.dispose()
    return good


if __name__ == "__main__":
    sys.exit(main())
