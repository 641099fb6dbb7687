"""What every process logs like: a line of JSON for each event, the libraries' as well as its own. Where the lines go is the
process's business."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO, cast

import structlog


class _Line(logging.Formatter):
    """A library's record in the form of ours."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"event": record.getMessage(), "level": record.levelname.lower(), "logger": record.name}
        line["timestamp"] = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Patient:
    """Of a stream, what loggers use. Nobody may be left who reads it: at a shutdown the journal ends first, and a worker that
    failed at a line would keep the machine waiting."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass


def configure(stream: TextIO) -> None:
    """For the whole process, once. Of a traceback the lines are told and never the variables: those hold keys and tokens."""
    patient = cast(TextIO, _Patient(stream))
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(patient),  # one write for each line: processes share a stream
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(patient)
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # What peers send wrong is answered and counted; aiohttp would add a traceback for each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
