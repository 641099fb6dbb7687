"""Express against user space: the same bytes, the same verdicts, the same counts; and that this test would see a difference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lab.pace import SLOW
from tests.e2e.answers import Plans, text
from tests.e2e.differential import SIDES, Counts, Twins
from tests.e2e.exchanges import ID, Sent, draw, head
from tests.e2e.mesh import Mesh
from tests.e2e.tampering import Tamper

SEED = int(os.environ.get("PILLION_DIFFERENTIAL_SEED", "5"))
EXCHANGES = int(os.environ.get("PILLION_DIFFERENTIAL_EXCHANGES", "200000"))
# Different ones; then the list begins anew, with other numbers in it and over other connections
DRAWN = int(os.environ.get("PILLION_DIFFERENTIAL_DRAWN", "40000"))
CARRIED_SHARE_MIN = 0.9  # of what the compiler calls expressible
RUN_MAX = 250_000  # exchanges of one seed
LASTING = 32  # exchanges of a connection before it is paired: they weigh in a short run
SHORT, WARM = 500, 100
EXAMPLES = min(2000, EXCHANGES // 500)
FAST = SIDES[1][0]


@pytest.fixture(scope="module")
def twins(mesh: Mesh) -> Iterator[Twins]:
    with Twins(mesh, Plans.make(SEED)).up() as found:
        yield found


@pytest.mark.timeout((300 + EXCHANGES // 300) * SLOW)
def test_same_bytes_same_verdicts_same_counts(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    """Stops at the first run with a difference; its seed makes the same exchanges again."""
    exchanges = expressible = carried = connections = 0
    for number in range(-(-EXCHANGES // RUN_MAX)):
        found = twins.run(draw(SEED + number, min(EXCHANGES, DRAWN), twins.plans), min(EXCHANGES, RUN_MAX))
        with capsys.disabled():
            print(f"\nseed {SEED}+{number}: {found}")
        assert not found.wrong, "\n".join(found.wrong)
        exchanges += found.exchanges
        expressible += found.expressible
        carried += found.carried
        connections += found.connections[1]
    assert exchanges >= EXCHANGES
    if EXCHANGES >= 200_000:
        assert carried >= max(CARRIED_SHARE_MIN * expressible, EXCHANGES / 2)
    else:
        assert carried >= max(1, CARRIED_SHARE_MIN * (expressible - LASTING * connections))


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
    before = twins.run(exchanges, len(exchanges), connections=4)  # so that there is a program to change
    assert not before.wrong, before.wrong
    write, undo = Tamper(twins.mesh, FAST).edge(to, like)
    try:
        half = len(exchanges) // 2
        found = twins.run(exchanges, len(exchanges), connections=4, part=half, between=write, warm=_plain(twins)[:WARM])
    finally:
        undo()
    again = twins.run(exchanges, len(exchanges), connections=4)
    assert not again.wrong, again.wrong
    assert any("the client saw" in text or "the server saw" in text for text in found.wrong), f"not seen: {found}"


def test_bytes_are_counted(twins: Twins) -> None:
    """Heads and bodies, of requests that come in one message and in two."""
    plan = twins.plans.kinds["plain"][6]
    raw = head(b"POST", b"/a", b"app.example", (b"content-length: 1000",), plan)
    one = Sent(raw + text(1000)), Sent(raw + text(1000), cuts=(len(raw),))
    before = Counts.read(twins.mesh)
    found = twins.run([one[number % 2] for number in range(SHORT)], SHORT, connections=3, warm=one * (WARM // 2))
    assert not found.wrong, found.wrong
    counts = Counts.read(twins.mesh) - before
    answered = counts.express["answered"]
    assert answered >= SHORT / 2
    assert counts.moved == {
        "in": answered * (len(raw) + 1000),
        "out": answered * sum(len(piece) for piece in twins.plans.all[plan].pieces),
    }


@pytest.mark.parametrize("change", [{"more": 1}, {"more": -1}, {"status": 201}], ids=str)
def test_a_changed_count_is_seen(twins: Twins, change: dict[str, int]) -> None:
    exchanges = _plain(twins)
    tamper = Tamper(twins.mesh, FAST)
    found = twins.run(
        exchanges,
        len(exchanges),
        connections=4,
        part=len(exchanges) // 2,
        between=lambda: tamper.statistics(**change),
        counted_s=0.5,  # one is missing
        warm=exchanges[:WARM],
    )
    assert any(text.startswith("counted by code") for text in found.wrong), f"not seen: {found}"
    assert not any("saw" in text for text in found.wrong), found.wrong


# ---- made by hypothesis: nothing here knows what is legal

NAMES = ("host", "Host", "connection", "content-length", "x-variant", "x-deny", "x-a", "accept", "te", "cookie", "x_deny")
VALUES = ("app.example", "bad.example", "keep-alive", "close", "0", "5", "05", "b", "c", "1", "", "a b", "x" * 300)
ODDITIES = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=6)
PIECES = st.one_of(st.sampled_from(["/a", "/b", "/only", "/", "private", ".", "..", "%61", "a", "?", "x=1", ";"]), ODDITIES)


@st.composite
def made_up(draw_from: st.DrawFn) -> Sent:
    method = draw_from(st.sampled_from(["GET", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "get", "G"]))
    path = draw_from(st.sampled_from(["/a", "/b", "/only", "/a/private", "/"])) + "".join(draw_from(st.lists(PIECES, max_size=2)))
    fields = [("Host", draw_from(st.sampled_from(["app.example", "x", "bad.example", "[::1]"])))]
    fields += draw_from(
        st.lists(st.tuples(st.sampled_from(NAMES[2:]) | ODDITIES, st.sampled_from(VALUES) | ODDITIES), max_size=3)
    )
    version = draw_from(st.sampled_from(["1.1"] * 9 + ["1.0"]))
    fields = [field for field in draw_from(st.permutations(fields)) if version == "1.1" or field[0] != "connection"]
    ends = version == "1.0" or ("connection", "close") in fields  # not for the next request to find out
    colon = draw_from(st.sampled_from([": ", ":", ":\t", ":  "]))
    number = draw_from(st.integers(0, 40))
    lines = [f"{method} {path}?i={ID.decode()}.0r{number} HTTP/{version}", *(f"{name}{colon}{value}" for name, value in fields)]
    raw = "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")
    lengths = {value for name, value in fields if name == "content-length"}
    raw += b"hello"[: min((int(value) for value in lengths if value.isdigit()), default=0)]
    cuts = draw_from(st.sets(st.integers(1, len(raw) - 1), max_size=3))
    return Sent(raw, (method == "HEAD",), tuple(sorted(cuts)), ends, "made_up")


@pytest.mark.timeout(300)
def test_what_hypothesis_makes(twins: Twins) -> None:
    """Among exchanges that keep the connections paired."""
    usual = _plain(twins)
    with twins.client_program(connections=1) as client:
        found, _ = client.run(usual[:100], list(range(100)))
        assert not found.wrong, found.wrong

        @seed(SEED)
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(made_up(), min_size=1, max_size=4), st.randoms(use_true_random=False))
        def same(made: list[Sent], rng: Random) -> None:
            exchanges = [rng.choice(usual), *(one for sent in made for one in (sent, usual[0]))]
            found, _ = client.run(exchanges, list(range(len(exchanges))))
            assert not found.wrong, "\n".join(found.wrong)

        same()
