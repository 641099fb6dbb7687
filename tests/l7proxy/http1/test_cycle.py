from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.errors import denied, reply
from l7proxy.http1.exchange import CLOSED, IDLE, RAW, Limits
from l7proxy.http1.request_side import LINGER_BYTES_MAX
from tests.l7proxy.http1.playbook import Playbook, Recorder

GET = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"
POST = b"POST /in HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST /in HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def t(data: bytes) -> str:
    return data.decode("latin-1")


def test_a_request_and_its_answer() -> None:
    play = Playbook()
    play.client(GET) >> ["decide GET /"]
    play.forward() >> ["upstream " + t(GET)]
    play.upstream(OK) >> ["client " + t(OK), "release", "finished 200"]
    play.client(GET) >> ["decide GET /"]  # from the memo


def test_the_body_goes_as_it_comes_and_only_the_body() -> None:
    play = Playbook(auto=True)
    play.client(POST + b"he") >> ["decide POST /in", "upstream " + t(POST), "upstream he"]
    play.client(b"llo" + GET) >> ["upstream llo"]
    play.upstream(OK) >> ["client " + t(OK), "release", "finished 200", "decide GET /", "upstream " + t(GET)]


def test_pipelined_requests_wait_their_turn() -> None:
    play = Playbook(auto=True)
    play.client(GET * 3) >> ["decide GET /", "upstream " + t(GET)]
    for _ in range(2):
        play.upstream(OK) >> ["client " + t(OK), "release", "finished 200", "decide GET /", "upstream " + t(GET)]
    play.upstream(OK) >> ["client " + t(OK), "release", "finished 200"]


def test_too_much_pipelining_is_not_read() -> None:
    play = Playbook(Limits(head_bytes_max=200))
    play.client(GET * 10) >> ["decide GET /", "pause client"]
    play.refuse(reply("no_route"))
    assert "resume client" in play.cycle.commands


def test_a_client_that_does_not_read_is_not_served_on() -> None:
    play = Playbook(Limits(head_bytes_max=200))
    play.client(GET) >> ["decide GET /"]
    play.client_blocked().refuse(reply("no_route")) >> ["client HTTP/1.1 404…", "finished 404 no_route"]
    play.client(GET) >> []
    play.client(GET * 10) >> ["pause client"]
    play.client_drained() >> ["resume client", "decide GET /", "pause client"]


def test_the_server_ends_an_upgraded_connection_first() -> None:
    play = Playbook(auto=True)
    play.client(UPGRADE).upstream(SWITCH).cycle.commands.clear()
    play.upstream_eof() >> ["end client"]
    play.client(b"last words") >> ["upstream last words"]
    play.client_eof() >> ["release close", "finished 101", "close client"]


def test_a_reset_of_an_upgraded_connection_is_passed_on() -> None:
    play = Playbook(auto=True)
    play.client(UPGRADE).upstream(SWITCH).cycle.commands.clear()
    play.upstream_lost(ConnectionResetError()) >> ["abandon", "finished 0 cut", "reset client"]


def test_a_response_to_nobody_is_not_taken() -> None:
    play = Playbook()
    play.upstream(OK) >> []


def test_bytes_beyond_the_response_are_not_forwarded() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(OK + b"HTTP/1.1 200 OK\r\n") >> ["client " + t(OK), "release close", "finished 200", "close client"]


def test_a_close_response_ends_with_the_connection() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    head = "HTTP/1.0 200 OK\r\n\r\nabc"
    play.upstream(head.encode()) >> ["client " + head]
    play.upstream(b"def") >> ["client def"]
    play.upstream_eof() >> ["release close", "finished 200", "close client"]


def test_a_cut_close_response_is_not_passed_off_as_whole() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(b"HTTP/1.1 200 OK\r\n\r\nabc") >> ["client …"]
    play.upstream_lost(ConnectionResetError()) >> ["abandon", "abandon", "finished 0 cut", "reset client"]


@pytest.mark.parametrize("status", [204, 304])
def test_bodyless_statuses(status: int) -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(b"HTTP/1.1 %d x\r\n\r\n" % status) >> ["client …", "release", f"finished {status}"]


def test_head_has_a_length_and_no_body() -> None:
    play = Playbook(auto=True)
    play.client(GET.replace(b"GET", b"HEAD")) >> ["decide HEAD /", "upstream …"]
    play.upstream(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n") >> ["client …", "release", "finished 200"]


def test_interim_responses_pass_and_are_bounded() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    hint = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    play.upstream(hint.encode() + OK) >> ["client " + hint, "client " + t(OK), "release", "finished 200"]
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(hint.encode() * 17)
    assert play.cycle.commands[-4:] == ["abandon", "abandon", "finished 0 cut", "reset client"]


def test_expect_continue() -> None:
    play = Playbook(auto=True)
    play.client(POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")) >> ["decide POST /in", "upstream …"]
    play.upstream(b"HTTP/1.1 100 Continue\r\n\r\n") >> ["client HTTP/1.1 100 Continue\r\n\r\n"]
    play.client(b"hello") >> ["upstream hello"]
    play.upstream(OK) >> ["client …", "release", "finished 200"]


def test_after_an_early_answer_the_body_goes_on_and_the_client_stays() -> None:
    play = Playbook(auto=True)
    play.client(POST) >> ["decide POST /in", "upstream …"]
    play.upstream(OK) >> ["client …"]
    play.client(b"he") >> ["upstream he"]
    play.client(b"llo" + GET) >> ["upstream llo", "release close", "finished 200", "decide GET /", "upstream …"]


def test_an_early_answer_is_not_lost_when_the_server_closes_behind_it() -> None:
    for event in ("upstream_eof", "upstream_lost"):
        play = Playbook(auto=True)
        play.client(POST + b"he").upstream(OK) >> ["decide POST /in", "upstream …", "upstream he", "client …"]
        getattr(play, event)(*[None] * (event == "upstream_lost")) >> ["release close", "finished 200", "end client"]
        play.client(b"llo") >> []
        play.after(10) >> ["close client"]


def test_an_early_answer_and_then_the_client_leaves() -> None:
    play = Playbook(auto=True)
    play.client(POST).upstream(OK) >> ["decide POST /in", "upstream …", "client …"]
    play.client_eof() >> ["release close", "finished 200", "close client"]


KEEP = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nconnection: close\r\n\r\nok"


@pytest.mark.parametrize("answer", [OK, KEEP, LAST])
def test_a_connection_that_is_to_end_says_so_in_its_next_answer(answer: bytes) -> None:
    play = Playbook(auto=True)
    play.end() >> []  # nothing is closed on a guess: a request may be on its way
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(answer) >> ["client " + t(LAST), "release close", "finished 200", "close client"]


CLOSE = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("answer", [OK, KEEP])
def test_a_client_that_asks_once_ends_its_own_connection_only(answer: bytes) -> None:
    play = Playbook(auto=True)
    play.client(CLOSE) >> ["decide GET /", "upstream " + t(GET)]
    play.upstream(answer) >> ["client " + t(LAST), "release", "finished 200", "close client"]


def test_a_client_that_asks_once_with_a_body() -> None:
    play = Playbook(auto=True)
    last = POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    play.client(last + b"hello") >> ["decide POST /in", "upstream " + t(POST), "upstream hello"]
    play.upstream(OK) >> ["client " + t(LAST), "release", "finished 200", "close client"]
    play = Playbook(auto=True)
    play.client(last + b"he").upstream(OK) >> [
        *("decide POST /in", "upstream " + t(POST), "upstream he", "client " + t(LAST)),
        *("release close", "finished 200", "end client"),  # nobody waits for the rest of it
    ]


def test_a_server_that_ends_its_connection_when_a_client_asks_once() -> None:
    play = Playbook(auto=True)
    ends = OK.replace(b"\r\n\r\n", b"\r\nConnection: Close\r\n\r\n")
    play.client(CLOSE).upstream(ends) >> [
        *("decide GET /", "upstream " + t(GET), "client " + t(ends)),
        *("release close", "finished 200", "close client"),
    ]
    play = Playbook(auto=True)
    play.client(CLOSE).upstream(b"HTTP/1.1 200 OK\r\n\r\nun").upstream_eof() >> [
        *("decide GET /", "upstream …", "client HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nun"),
        *("release close", "finished 200", "close client"),
    ]
    play = Playbook(auto=True)
    play.client(CLOSE).upstream(OK + b"more") >> [
        *("decide GET /", "upstream …", "client " + t(LAST), "release close", "finished 200", "close client")
    ]


def test_no_second_request_is_taken_of_a_client_that_asks_once() -> None:
    play = Playbook(auto=True)
    play.client(CLOSE + GET) >> ["decide GET /", "upstream " + t(GET)]
    play.upstream(OK) >> ["client " + t(LAST), "release", "finished 200", "end client"]


def test_a_client_that_asks_once_on_a_connection_that_is_to_end() -> None:
    play = Playbook(auto=True)
    play.client(CLOSE).end().upstream(OK) >> [
        *("decide GET /", "upstream " + t(GET), "client " + t(LAST), "release", "finished 200", "close client")
    ]


def test_an_answer_whose_head_is_out_is_not_the_last() -> None:
    play = Playbook(auto=True)
    play.client(GET).upstream(OK[:-1]).end() >> ["decide GET /", "upstream …", "client …"]
    play.upstream(OK[-1:]) >> ["client k", "release", "finished 200"]
    assert play.cycle.idle
    play.end_idle() >> ["close client"]


def test_a_refusal_on_a_connection_that_is_to_end() -> None:
    play = Playbook()
    play.client(GET).end().refuse(reply("no_route")) >> ["decide GET /", "client …", "finished 404 no_route", "close client"]
    assert b"\r\nconnection: close\r\n" in play.cycle.client_bytes
    play.end_idle() >> []


def test_lingering_is_bounded() -> None:
    play = Playbook(auto=True)
    play.client(b"\0") >> ["client HTTP/1.1 400…", "finished 400 bad_request", "end client"]
    play.client(b"x" * (LINGER_BYTES_MAX + 1)) >> ["close client"]


def test_chunked_both_ways_with_trailers() -> None:
    play = Playbook(auto=True)
    body = b"3;a=b\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"
    play.client(CHUNKED + body) >> ["decide POST /in", "upstream " + t(CHUNKED), "upstream " + t(body)]
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    play.upstream(answer + b"2\r\nok") >> ["client " + t(answer) + "2\r\nok"]
    play.upstream(b"\r\n0") >> ["client \r\n"]
    play.upstream(b"\r\n\r\n") >> ["client 0\r\n\r\n", "release", "finished 200"]


def test_a_broken_chunk_is_answered_and_never_forwarded() -> None:
    play = Playbook(auto=True)
    play.client(CHUNKED + b"5\r\nhello\r\nZZ\r\n")
    assert "ZZ" not in t(play.cycle.upstream_bytes)
    assert play.cycle.client_bytes.startswith(b"HTTP/1.1 400")
    assert play.cycle.commands[-3:] == ["client " + t(play.cycle.client_bytes), "finished 400 bad_request", "end client"]


def test_a_broken_response_chunk_cuts_the_client() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
    assert play.cycle.commands[-1] == "reset client"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH",
    ],
)
def test_a_refused_response_becomes_502(head: bytes) -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.upstream(head) >> ["abandon", "client HTTP/1.1 502 Bad Gateway\r\n…", "finished 502 bad_response", "close client"]


def test_a_websocket_is_raw_after_its_101() -> None:
    play = Playbook(auto=True)
    play.client(UPGRADE) >> ["decide GET /ws", "upstream " + t(UPGRADE)]
    play.client(b"early") >> []  # not before the server agreed
    play.upstream(SWITCH + b"frame") >> ["client " + t(SWITCH) + "frame", "upstream early"]
    play.client(GET) >> ["upstream " + t(GET)]
    play.client_eof() >> ["end upstream"]
    play.upstream_eof() >> ["release close", "finished 101", "close client"]


def test_a_refused_websocket_stays_http() -> None:
    play = Playbook(auto=True)
    play.client(UPGRADE + GET) >> ["decide GET /ws", "upstream " + t(UPGRADE)]
    refusal = b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n"
    play.upstream(refusal) >> ["client " + t(refusal), "release close", "finished 426 behind_upgrade", "end client"]
    play = Playbook(auto=True)
    play.client(UPGRADE) >> ["decide GET /ws", "upstream " + t(UPGRADE)]
    play.upstream(refusal) >> ["client " + t(refusal), "release close", "finished 426", "close client"]


def test_a_stale_connection_is_tried_once_more() -> None:
    play = Playbook()
    play.client(GET) >> ["decide GET /"]
    play.forward(reused=True) >> ["upstream " + t(GET)]
    play.upstream_lost(None) >> ["abandon", "again GET /"]
    play.forward() >> ["upstream " + t(GET)]
    play.upstream_lost(None) >> ["abandon", "client HTTP/1.1 502…", "finished 502 upstream_reset", "close client"]


def test_what_is_not_idempotent_is_not_tried_again() -> None:
    play = Playbook(auto=True, reused=True)
    play.client(POST + b"hello") >> ["decide POST /in", "upstream …", "upstream hello"]
    play.upstream_lost(ConnectionResetError()) >> [
        "abandon",
        "client HTTP/1.1 502…",
        "finished 502 upstream_reset",
        "close client",
    ]


def test_an_answer_of_our_own_keeps_the_connection() -> None:
    play = Playbook()
    play.client(GET) >> ["decide GET /"]
    play.refuse(denied("shop/deny#0")) >> ["client HTTP/1.1 403 Forbidden\r\n…", "finished 403 policy_denied"]
    assert b"RBAC: denied by shop/deny#0" in play.cycle.client_bytes
    assert play.cycle.rq == IDLE
    play.client(POST) >> ["decide POST /in"]
    play.refuse(denied("shop/deny#0")) >> ["client HTTP/1.1 403…", "finished 403 policy_denied", "end client"]
    assert play.cycle.rq == CLOSED


def test_slow_heads_are_answered_408_whatever_they_trickle() -> None:
    play = Playbook(Limits(head_timeout_s=10))
    play.client(GET[:5]) >> []
    for n in range(5, 14):
        play.after(1).client(GET[n : n + 1]) >> []
    play.after(2) >> ["client HTTP/1.1 408…", "finished 408 head_timeout", "end client"]


def test_idle_connections_close_without_a_word() -> None:
    play = Playbook(Limits(idle_timeout_s=60))
    play.after(61) >> ["close client"]


def test_a_silent_server_is_answered_504() -> None:
    play = Playbook(Limits(request_timeout_s=15), auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.after(16) >> ["abandon", "client HTTP/1.1 504…", "finished 504 request_timeout", "close client"]


def test_the_client_leaves() -> None:
    play = Playbook(auto=True)
    play.client(GET) >> ["decide GET /", "upstream …"]
    play.client_lost() >> ["abandon", "finished 0 client_gone"]


def test_the_client_ends_after_its_request() -> None:
    play = Playbook(auto=True)
    play.client(GET).client_eof() >> ["decide GET /", "upstream …"]
    play.upstream(OK) >> ["client " + t(OK), "release", "finished 200", "close client"]


def test_http_1_0_closes_unless_both_say_otherwise() -> None:
    play = Playbook(auto=True)
    play.client(b"GET / HTTP/1.0\r\n\r\n") >> ["decide GET /", "upstream …"]
    play.upstream(OK) >> ["client …", "release close", "finished 200", "close client"]
    play = Playbook(auto=True)
    play.client(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") >> ["decide GET /", "upstream …"]
    play.upstream(OK.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")) >> ["client …", "release", "finished 200"]


def test_oversized_heads_are_answered_431() -> None:
    for data in (b"GET / HTTP/1.1\r\nA: " + b"a" * 300, GET[:-2] + b"A: " + b"a" * 300 + b"\r\n\r\n"):
        play = Playbook(Limits(head_bytes_max=256))
        play.client(data) >> ["client HTTP/1.1 431…", "finished 431 head_too_large", "end client"]


CONVERSATIONS = [  # the client's bytes, and the server's for each request it is asked
    (GET * 3, [OK] * 3),
    (POST + b"hello" + GET, [OK, b"HTTP/1.1 304 x\r\n\r\n"]),
    (
        CHUNKED + b"a;x\r\n0123456789\r\n0\r\nA: b\r\n\r\n" + GET,
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", OK],
    ),
    (UPGRADE + b"\x81\x00", [SWITCH + b"\x81\x00"]),
    (GET + b"GET /a HTTP/1.1\nHost: web\r\n\r\n", [OK]),
    (CHUNKED + b"3\r\nabcX", []),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []),
    (GET, [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx"]),
    (GET, [b"HTTP/1.1 103 x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nto the end"]),
]


def converse(requests: list[bytes], responses: list[bytes]) -> tuple[bytes, bytes, list[str]]:
    """All of the client's pieces, then each piece of the server's as long as it is asked."""
    cycle: Recorder = Playbook(auto=True).cycle
    for piece in requests:
        cycle.client_data(piece)
    for piece in responses:
        cycle.upstream_data(piece)
    told = [
        command
        for command in cycle.commands
        if command.startswith(("decide", "finished", "release", "reset", "end client", "close"))
    ]
    return cycle.client_bytes, cycle.upstream_bytes, told


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % len(data) for cut in cuts} - {0}) if data else []
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@given(st.lists(st.integers(0, 1000), max_size=12), st.lists(st.integers(0, 1000), max_size=12))
def test_any_split_of_the_bytes_gives_the_same(number: int, cuts: list[int], upcuts: list[int]) -> None:
    requests, responses = CONVERSATIONS[number]
    parts = [piece for response in responses for piece in pieces(response, upcuts)]
    client, upstream, told = converse(pieces(requests, cuts), parts)
    whole_client, whole_upstream, whole_told = converse([requests], responses)
    assert (client, told) == (whole_client, whole_told)
    # what was sound before the fault may have gone on already
    assert upstream == whole_upstream or (b" 400 " in client and upstream.startswith(whole_upstream))


def test_raw_state_is_reached_only_by_101() -> None:
    play = Playbook(auto=True)
    play.client(UPGRADE)
    assert play.cycle.rq != RAW
    play.upstream(SWITCH)
    assert play.cycle.rq == RAW


def adopting(raw: bytes = GET, *, left: int = 0, status: int = 0, upleft: int = 0, elapsed: float = 0.0) -> Playbook:
    play = Playbook(auto=True)
    head = play.cycle.heads.request(raw)
    play.cycle.adopt(head, left=left, status=status, upleft=upleft, elapsed=elapsed)
    play >> []
    return play


def test_adopted_before_the_response() -> None:
    play = adopting()
    play.upstream(OK[:10]) >> []
    play.upstream(OK[10:]) >> ["client " + t(OK), "release", "finished 200"]
    play.client(GET) >> ["decide GET /", "upstream " + t(GET)]


def test_adopted_in_the_middle_of_its_bodies() -> None:
    play = adopting(POST, left=2)
    play.client(b"lo" + GET) >> ["upstream lo"]
    play.upstream(OK) >> ["client " + t(OK), "release", "finished 200", "decide GET /", "upstream " + t(GET)]
    play = adopting(status=206, upleft=3)
    play.upstream(b"ab") >> ["client ab"]
    play.upstream(b"c") >> ["client c", "release", "finished 206"]
    play = adopting(status=206, upleft=3)
    play.upstream(b"abcd") >> ["client abc", "release close", "finished 206", "close client"]


def test_an_adopted_exchange_is_tried_again_only_if_nothing_was_seen_of_it() -> None:
    adopting().upstream_eof() >> ["abandon", "again GET /"]
    adopting(POST, left=2).upstream_eof() >> ["abandon", "client HTTP/1.1 502…", "finished 502 upstream_reset", "end client"]
    adopting(status=200, upleft=3).upstream_eof() >> ["abandon", "abandon", "finished 0 cut", "reset client"]


def test_an_adopted_exchange_has_the_time_that_is_left() -> None:
    adopting(elapsed=10.0).after(4.0) >> []
    adopting(elapsed=10.0).after(6.0) >> ["abandon", "client HTTP/1.1 504…", "finished 504 request_timeout", "close client"]
    adopting(status=200, upleft=3, elapsed=10.0).after(6.0) >> []


def test_rest_is_heard_when_nothing_is_pending() -> None:
    play = Playbook(auto=True)
    heard: list[int] = []
    play.cycle.rest = lambda: heard.append(len(play.cycle.client_bytes))
    play.client(GET * 2)
    play.upstream(OK)
    assert not heard
    play.upstream(OK)
    assert heard == [2 * len(OK)]
    play.client(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    play.upstream(OK)
    assert len(heard) == 1
