"""Tables for people, JSON and YAML for machines. What comes from outside is escaped: no terminal codes pass."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 240
CLEAR = "\x1b[H\x1b[2J"


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def printable(value: Any) -> str:
    """Text of a value with control characters escaped."""
    text = "-" if value in (None, "") else ("yes" if value is True else "no" if value is False else str(value))
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def error(what: str, remedy: str) -> None:
    """On stderr: what is wrong, and what to do. Lines stay lines."""
    for indent, text in (("error: ", what), ("  ", remedy)):
        print(indent + "\n".join(map(printable, text.splitlines())), file=sys.stderr)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False, markup=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns with a heading; nothing is cut when the output is no terminal."""
    shown = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console().print(shown)


def look(columns: Sequence[str], rows: Sequence[Any], cells: Callable[[Any], Sequence[Any]], form: Format, follow: bool) -> None:
    """What there is now; where it is followed on a terminal it replaces what there was."""
    if form is not Format.TABLE:
        machine(rows, form)
    else:
        if follow and sys.stdout.isatty():
            print(CLEAR, end="")
        table(columns, map(cells, rows))
    sys.stdout.flush()


def machine(value: Any, form: Format) -> None:
    """JSON or YAML, complete."""
    if form is Format.JSON:
        print(json.dumps(value, indent=2))  # in ASCII: some terminals take letters above it for commands
    elif isinstance(value, list) and all(isinstance(item, dict) and "kind" in item for item in value):
        print(yaml.safe_dump_all(value, sort_keys=False, explicit_start=True), end="")
    else:
        print(yaml.safe_dump(value, sort_keys=False), end="")


def age(seconds: float | None) -> str:
    """Short, for tables: 12s, 5m, 3h, 2d."""
    if seconds is None:
        return "-"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if abs(seconds) < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def until(unix: float | None) -> str:
    """How long until a time."""
    return "-" if not unix else age(unix - time.time())
