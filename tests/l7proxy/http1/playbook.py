"""Dialogues with `Cycle`: events in, the commands they cause out, as text.

play = Playbook()
play.client(b"GET / …") >> ["decide GET /"]
"""

from __future__ import annotations

from l7proxy.errors import Reply
from l7proxy.http1.cycle import Cycle
from l7proxy.http1.exchange import Clock, Limits
from l7proxy.http1.head import Heads, RequestHead


class Recorder(Cycle):
    """Writes its commands down. ``auto``: answers decide with forward at once."""

    def __init__(self, limits: Limits, clock: Clock, *, auto: bool = False, reused: bool = False) -> None:
        super().__init__(Heads(), limits, clock)
        self.commands: list[str] = []
        self.auto, self.auto_reused = auto, reused
        self.client_bytes = b""
        self.upstream_bytes = b""
        self.to_client = self._to_client
        self.to_upstream = self._to_upstream

    def decide(self, head: RequestHead) -> None:
        self.commands.append(f"decide {head.method} {head.path}")
        if self.auto:
            self.forward(head.onward, reused=self.auto_reused)

    def again(self, head: RequestHead) -> None:
        self.commands.append(f"again {head.method} {head.path}")

    def _to_client(self, data: bytes) -> None:
        assert data
        self.client_bytes += data
        self.commands.append(f"client {data.decode('latin-1')}")

    def _to_upstream(self, data: bytes) -> None:
        assert data
        self.upstream_bytes += data
        self.commands.append(f"upstream {data.decode('latin-1')}")

    def release(self, reusable: bool) -> None:
        self.commands.append("release" if reusable else "release close")

    def finished(self, status: int, why: str) -> None:
        self.commands.append(f"finished {status} {why}".strip())

    def __getattribute__(self, name: str) -> object:
        if name in {"abandon", "end_client", "close_client", "reset_client", "end_upstream", "pause_client", "resume_client"}:
            return lambda: self.commands.append(name.replace("_", " "))
        return super().__getattribute__(name)


class Playbook:
    def __init__(self, limits: Limits | None = None, *, auto: bool = False, reused: bool = False) -> None:
        self.clock = Clock()
        self.cycle = Recorder(limits or Limits(), self.clock, auto=auto, reused=reused)

    def client(self, data: bytes) -> Playbook:
        self.cycle.client_data(data)
        return self

    def upstream(self, data: bytes) -> Playbook:
        self.cycle.upstream_data(data)
        return self

    def forward(self, *, reused: bool = False) -> Playbook:
        assert self.cycle.request is not None
        self.cycle.forward(self.cycle.request.onward, reused=reused)
        return self

    def refuse(self, answer: Reply) -> Playbook:
        self.cycle.refuse(answer)
        return self

    def after(self, seconds: float) -> Playbook:
        """What the sweep does."""
        self.clock.now += seconds
        if self.cycle.deadline < self.clock.now:
            self.cycle.timeout()
        return self

    def __getattr__(self, name: str) -> object:
        def event(*args: object) -> Playbook:
            getattr(self.cycle, name)(*args)
            return self

        return event

    def __rshift__(self, expected: list[str]) -> Playbook:
        """These commands, no others; ``…`` at the end of one: the rest does not matter."""
        got, self.cycle.commands = self.cycle.commands, []
        assert len(got) == len(expected) and all(
            g.startswith(e[:-1]) if e.endswith("…") else g == e for g, e in zip(got, expected, strict=True)
        ), f"expected {expected}\n     got {got}"
        return self
