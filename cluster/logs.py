"""Logging of Rayloop's own processes: readable lines, or one JSON object a line for collectors."""

import json
import logging
import sys
from datetime import UTC, datetime

from cluster.settings.runtime import LoggingSettings

_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; everything passed in `extra` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _StandardErrorHandler(logging.Handler):
    """Writes to what standard error is at that moment; a redirection that has ended is not written to."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging(settings: LoggingSettings) -> None:
    """Send our log records to standard error at the configured level."""
    handler = _StandardErrorHandler()
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if settings.json_lines else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for folder in ("cluster", "data", "train", "tune", "serve"):
        logging.getLogger(folder).setLevel(settings.level)
