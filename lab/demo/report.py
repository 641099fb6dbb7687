"""What the demo prints: a line for each thing shown, progress while it takes long, a table at the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

SILENCE_S_MAX = 2.0


@dataclass(frozen=True)
class Shown:
    """One scene: what was to be seen, whether it was, and what was observed."""

    title: str
    ok: bool
    observed: str
    seconds: float


class Report:
    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else 160
        self.console = Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
        self.shown: list[Shown] = []
        self._said = 0.0

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(Text(f"     {text}", style="dim"))

    def title(self, text: str) -> None:
        self.console.print(Text(text, style="bold"))

    def add(self, shown: Shown) -> None:
        self.shown.append(shown)
        mark = (" ok  ", "green") if shown.ok else ("FAIL ", "bold red")
        self.console.print(Text.assemble(mark, (f"{shown.title}: ", "bold"), shown.observed))

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Says that `what` still goes on, where nothing else was said for two seconds."""
        over = threading.Event()
        began = self._said = time.monotonic()

        def tick() -> None:
            while not over.wait(max(0.1, self._said + SILENCE_S_MAX - time.monotonic())):
                if time.monotonic() - self._said >= SILENCE_S_MAX:
                    self.say(f"{what} … {time.monotonic() - began:.0f} s")

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def table(self) -> bool:
        """The final table; True if all was seen."""
        table = Table("", "SHOWN", "OBSERVED", "s", box=None, header_style="bold", padding=(0, 1))
        for shown in self.shown:
            mark = Text("ok", style="green") if shown.ok else Text("FAIL", style="bold red")
            table.add_row(mark, Text(shown.title), Text(shown.observed), Text(f"{shown.seconds:.1f}"))
        self.console.print()
        self.console.print(table)
        good = sum(shown.ok for shown in self.shown)
        self.console.print(
            Text(f"\n{good} of {len(self.shown)} seen", style="bold green" if good == len(self.shown) else "bold red")
        )
        return bool(self.shown) and good == len(self.shown)
