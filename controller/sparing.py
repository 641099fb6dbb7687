"""The log is spared what comes in floods: of each kind of line a few are written in a while, the rest is counted and summed up in
one line when the while is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

LINES_MAX, WINDOW_S = 10, 10.0  # of one kind
KINDS_MAX = 4_096  # at a time; what is beyond shares one

Kind = tuple[str, ...]
_BEYOND: Kind = ()


@dataclass
class _Window:
    end: asyncio.TimerHandle
    lines: int = 0


class Sparing:
    """``sum_up`` is told of a kind, and how many of its lines were left out. For one event loop; without one nothing is left
    out."""

    def __init__(self, sum_up: Callable[[Kind, int], None]) -> None:
        self._sum_up = sum_up
        self._windows: dict[Kind, _Window] = {}

    def passes(self, *kind: str) -> bool:
        """Whether one more line of the kind is to be written."""
        window = self._windows.get(kind)
        if window is None and len(self._windows) > KINDS_MAX:
            kind = _BEYOND
            window = self._windows.get(kind)
        if window is None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return True
            window = self._windows[kind] = _Window(loop.call_later(WINDOW_S, partial(self._over, kind)))
        window.lines += 1
        return window.lines <= LINES_MAX

    def close(self) -> None:
        """Tells what is left to tell."""
        for kind in list(self._windows):
            self._over(kind)

    def _over(self, kind: Kind) -> None:
        window = self._windows.pop(kind)
        window.end.cancel()
        if window.lines > LINES_MAX:
            self._sum_up(kind, window.lines - LINES_MAX)
