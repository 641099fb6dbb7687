"""What a fuzz target is: bytes made, bytes checked, and how a check says what it found."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from random import Random

CORPUS = Path(__file__).parent / "corpus"


class Disagreement(Exception):
    """Pillion accepted a case that ``reader`` reads differently, or broke a promise of its own (reader "pillion").
    ``what``: a few constant words; ``detail``: both readings."""

    def __init__(self, reader: str, what: str, detail: str = "") -> None:
        super().__init__(f"{reader}: {what}: {detail}")
        self.reader, self.what, self.detail = reader, what, detail


class Target:
    """A case is bytes; all a check needs (split points, samples) follows from them, so a file replays a finding."""

    name = ""
    tokens: tuple[bytes, ...] = ()  # what mutation splices in

    def __init__(self) -> None:
        self.compared: dict[str, int] = {}  # reader -> cases or messages it was asked about

    def generate(self, rng: Random) -> bytes:
        """A case by grammar."""
        raise NotImplementedError

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:
        """What happened, coarsely: a new value makes the case worth mutating. ``deep``: every split point, every
        reader. Raises Disagreement; any other exception is a crash of what is tested."""
        raise NotImplementedError

    def drain(self) -> list[tuple[bytes, Disagreement]]:
        """What readers that are asked in batches found since the last call."""
        return []

    def close(self) -> None:
        """Stop what was started."""

    def corpus(self) -> Iterator[Path]:
        yield from sorted((CORPUS / self.name).glob("*"))
