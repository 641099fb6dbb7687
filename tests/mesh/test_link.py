import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import link
from mesh.link import Ack, Decoder, Leg, Legged, LinkError, Listener, Scrape, Svid, Unleg, Update, encode
from tests.mesh.build import state, workload

MESSAGES = [
    (Update(3, True, state(workload()), ("Workload/shop/x",), generation=2), 0),
    (Listener("1/outbound/2", "outbound", 1, "127.0.0.1", 15001), 1),
    (Svid("spiffe://mesh.local/ns/shop/sa/web", "PEM", "0a", 1.5), 1),
    (Scrape(), 0),
    (Ack(3, "ab"), 0),
    (Leg(1 << 48 | 5, "Workload/shop/x", True), 1),
    (Unleg(1 << 48 | 5), 0),
    (Legged(1 << 48 | 5, False, "busy"), 0),
]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_messages_and_their_descriptors_survive_any_split(sizes):
    stream = b"".join(encode(message, nfds) for message, nfds in MESSAGES)
    decoder, seen, fds = Decoder(), [], [7, 8, 9]
    position = index = 0
    while position < len(stream):
        size = sizes[index % len(sizes)]
        seen += decoder.feed(stream[position : position + size], fds if position == 0 else [])
        position, index = position + size, index + 1
    assert [message for message, _ in seen] == [message for message, _ in MESSAGES]
    assert [own for _, own in seen] == [[], [7], [8], [], [], [9], [], []]
    assert decoder.take_fds() == []


@pytest.mark.parametrize(
    "data",
    [
        (link.FRAME_BYTES_MAX + 1).to_bytes(4, "big") + bytes(4),
        bytes(4) + (link.FRAME_FDS_MAX + 1).to_bytes(4, "big"),
        (2).to_bytes(4, "big") + bytes(4) + b"{}",
        (1).to_bytes(4, "big") + bytes(4) + b"\xff",
    ],
)
def test_broken_framing_is_an_error_and_no_descriptor_is_lost(data):
    decoder = Decoder()
    with pytest.raises(LinkError):
        decoder.feed(data, [5])
    assert decoder.take_fds() == [5]


def test_missing_descriptors_are_an_error():
    with pytest.raises(LinkError, match="missing"):
        Decoder().feed(encode(MESSAGES[1][0], 1), [])


def test_too_many_descriptors_are_not_sent():
    with pytest.raises(LinkError, match="over the limit"):
        encode(Scrape(), link.FRAME_FDS_MAX + 1)
