"""What every process logs like: a line of JSON for each event, the libraries' as well as its own. Where the lines go is the
process's business."""

from __future__ import annotations

import json
import logging
from typing import TextIO

import structlog


class _Line(logging.Formatter):
    """A library's record in the form of ours."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"event": record.getMessage(), "level": record.levelname.lower(), "logger": record.name}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(stream: TextIO) -> None:
    """For the whole process, once. Of a traceback the lines are told and never the variables: those hold keys and tokens."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(stream),  # one write for each line: processes share a stream
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # What peers send wrong is answered and counted; aiohttp would add a traceback for each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
