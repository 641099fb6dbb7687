"""Express against user space: the same bytes, the same verdicts, the same counts; and that this test would see a difference."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.answers import Plans
from tests.e2e.differential import SIDES, Twins
from tests.e2e.exchanges import Sent, draw, head
from tests.e2e.mesh import Mesh
from tests.e2e.tampering import Tamper

SEED = int(os.environ.get("PILLION_DIFFERENTIAL_SEED", "5"))
EXCHANGES = int(os.environ.get("PILLION_DIFFERENTIAL_EXCHANGES", "200000"))
DRAWN = 40_000  # different ones; then the list begins anew, with other numbers in it and over other connections
CARRIED_SHARE_MIN = 0.9  # of what the compiler calls expressible
LASTING = 32  # exchanges of a connection before it is paired: they weigh in a short run
SHORT = 500
FAST = SIDES[1][0]


@pytest.fixture(scope="module")
def twins(mesh: Mesh) -> Iterator[Twins]:
    with Twins(mesh, Plans.make(SEED)).up() as found:
        yield found


def test_same_bytes_same_verdicts_same_counts(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    found = twins.run(draw(SEED, min(EXCHANGES, DRAWN), twins.plans), EXCHANGES)
    with capsys.disabled():
        print(f"\n{found}")
    assert not found.wrong, "\n".join(found.wrong)
    assert found.exchanges >= EXCHANGES
    if EXCHANGES >= 200_000:
        assert found.carried >= max(CARRIED_SHARE_MIN * found.expressible, 100_000)
    else:
        assert found.carried >= CARRIED_SHARE_MIN * (found.expressible - LASTING * found.connections[1])


def _plain(twins: Twins, *others: Sent) -> list[Sent]:
    """Exchanges the kernel carries, and the others among them."""
    drawn = [sent for sent in draw(SEED, 2000, twins.plans) if sent.kind == "plain" and not sent.once]
    made = []
    for number, sent in enumerate(drawn[:SHORT]):
        made += [sent, others[number % len(others)]] if others and number % 5 == 4 else [sent]
    return made


def _head(path: bytes = b"/a", *fields: bytes, host: bytes = b"app.example") -> Sent:
    return Sent(head(b"GET", path, host, fields, 0))


EDGES = {
    "a denied path": (b"GET /b/s", b"GET /b/t", _head(b"/b/secret")),
    "a path of another rule": (b"GET /o", b"GET /a/b", _head(b"/only")),
    "a denied host": (b"GET /a HTTP/1.1\r\nHost: b", b"GET /a HTTP/1.1\r\nHost: c", _head(host=b"bad.example")),
    "a denied header": (
        b"GET /a HTTP/1.1\r\nHost: x\r\nx-deny: 1",
        b"GET /a HTTP/1.1\r\nHost: x\r\nx-deny: 0",
        _head(b"/a", b"x-deny: 1"),
    ),
    "a header that is read": (
        b"GET /a HTTP/1.1\r\nHost: x\r\nx-variant: b",
        b"GET /a HTTP/1.1\r\nHost: x\r\nx-variant: c",
        _head(b"/a", b"x-variant: b"),
    ),
}


@pytest.mark.parametrize("what", EDGES)
def test_a_changed_transition_is_seen(twins: Twins, what: str) -> None:
    to, like, asked = EDGES[what]
    exchanges = _plain(twins, asked)
    write, undo = Tamper(twins.mesh, FAST).edge(to, like)
    try:
        found = twins.run(exchanges, len(exchanges), connections=4, part=len(exchanges) // 2, between=write)
    finally:
        undo()
    assert any("the client saw" in text or "the server saw" in text for text in found.wrong), f"not seen: {found}"


@pytest.mark.parametrize("change", [{"more": 1}, {"more": -1}, {"status": 201}], ids=str)
def test_a_changed_count_is_seen(twins: Twins, change: dict[str, int]) -> None:
    exchanges = _plain(twins)
    tamper = Tamper(twins.mesh, FAST)
    found = twins.run(
        exchanges, len(exchanges), connections=4, part=len(exchanges) // 2, between=lambda: tamper.statistics(**change)
    )
    assert any(text.startswith("counted by code") for text in found.wrong), f"not seen: {found}"
    assert not any("saw" in text for text in found.wrong), found.wrong
