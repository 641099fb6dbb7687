"""Target http1-requests: a client's bytes. What Pillion forwards is one request to every reader, and ends where Pillion
says; and Pillion reads the same however the bytes are cut."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from random import Random
from zlib import crc32

from fuzz.http1 import grammar
from fuzz.http1.nginx import Echo, Nginx
from fuzz.http1.reading import LIMITS, Httptools, Message, Requests, body_bytes, h11_request
from fuzz.target import Disagreement, Target
from l7proxy.http1.added import with_headers
from l7proxy.http1.head import FIELDS_MAX, Heads, RequestHead, parse_request

SENTINEL = b"GET /sentinel HTTP/1.1\r\nHost: sentinel\r\n\r\n"
REFUSALS = {(400, "bad_request"), (431, "head_too_large")}
ADDED = ("x-forwarded-client-cert", "x-request-id", "traceparent")
CERTIFICATE = b"x-forwarded-client-cert"
SOURCE = "spiffe://mesh.local/ns/shop/sa/web"
H11_EVERY = 16  # cases
NGINX_EVERY = 8
DEEP_BYTES_MAX = 2048  # every single split point up to this size


def splits(case: bytes, deep: bool) -> Iterator[tuple[int, ...]]:
    """Where to cut; () for byte by byte. They follow from the bytes."""
    size = len(case)
    if deep:
        yield ()
        if size <= DEEP_BYTES_MAX:
            yield from ((at,) for at in range(1, size))
        return
    number = crc32(case)
    if number & 31 == 0 and size < 256:
        yield ()
        return
    first = 1 + (number >> 5) % max(1, size - 1)
    yield (first,) if number & 1 else tuple(sorted({first, 1 + (number >> 13) % max(1, size - 1)}))


class HttpRequests(Target):
    name = "http1-requests"
    tokens = grammar.TOKENS

    def __init__(self, nginx: Nginx | None = None) -> None:
        super().__init__()
        self.heads = Heads()  # shared between cases, so that what is remembered is tested against what is parsed
        self.echo = Echo(nginx) if nginx else None
        self.count = 0
        self.compared = {"accepted": 0, "httptools": 0, "h11": 0, "nginx": 0, "httptools-refused": 0, "h11-refused": 0}

    def generate(self, rng: Random) -> bytes:
        return grammar.requests(rng)

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:
        if not case:
            return None
        whole = Requests(self.heads)
        whole.feed(case)
        for cuts in splits(case, deep):
            self._same_when_cut(case, whole, cuts)
        exchanges = whole.exchanges
        signature = (
            whole.reply,
            whole.ends,
            tuple([(min(head.framing, 1), head.version, head.close, head.expect, head.path_fault) for head, _ in exchanges]),
        )
        if not exchanges:
            return signature
        sent = whole.forwarded()
        if not case.startswith(b"".join(_as_it_came(head, data) for (head, _), data in zip(exchanges, sent, strict=True))):
            raise Disagreement("pillion", "forwards other bytes than came")
        self.count += 1
        self.compared["accepted"] += 1
        self._httptools(whole, sent)
        if deep or self.count % H11_EVERY == 0:
            self._h11(whole, sent)
            for head, _ in exchanges:
                _same_with_headers_added(head)
        if self.echo is not None and (deep or self.count % NGINX_EVERY == 0):
            for index, (head, _) in enumerate(exchanges[: whole.done]):
                if head.keep and not head.websocket:
                    self.echo.add(case, head, sent[index])
            if deep:
                for _, disagreement in self.drain():
                    raise disagreement
        return signature

    def drain(self) -> list[tuple[bytes, Disagreement]]:
        if self.echo is None:
            return []
        found = self.echo.run()
        self.compared["nginx"], self.compared["nginx-refused"] = self.echo.asked, self.echo.refused
        return found

    def close(self) -> None:
        if self.echo is not None:
            self.echo.close()

    def _same_when_cut(self, case: bytes, whole: Requests, cuts: tuple[int, ...]) -> None:
        parts = Requests(Heads())
        if cuts:
            at = 0
            for cut in (*cuts, len(case)):
                if cut > at:
                    parts.feed(case[at:cut])
                    at = cut
        else:
            for at in range(len(case)):
                parts.feed(case[at : at + 1])
        if [head.raw for head, _ in parts.exchanges] != [head.raw for head, _ in whole.exchanges]:
            raise Disagreement("pillion", "other requests when cut", f"at {cuts}")
        replies = {whole.reply, parts.reply}
        if len(replies) > 1 and len(case) > LIMITS.head_bytes_max:
            replies -= REFUSALS  # too large or malformed: which is seen first is a matter of reads
        if len(replies) > 1 or parts.done != whole.done:
            raise Disagreement("pillion", "another end when cut", f"at {cuts}: {whole.reply} then {parts.reply}")
        ours, theirs = whole.forwarded(), parts.forwarded()
        if ours != theirs:
            broken = whole.reply is not None and len(whole.exchanges) > whole.done
            if not (broken and ours[:-1] == theirs[:-1] and theirs[-1].startswith(ours[-1])):
                raise Disagreement("pillion", "forwards other bytes when cut", f"at {cuts}")

    def _httptools(self, whole: Requests, sent: list[bytes]) -> None:
        exchanges, done = whole.exchanges, whole.done
        last = exchanges[-1][0]
        sentinel = done == len(exchanges) and (last.keep or last.last) and not last.websocket
        read = Httptools(b"".join((*sent, SENTINEL)) if sentinel else b"".join(sent))
        self.compared["httptools"] += 1
        if read.error:
            self.compared["httptools-refused"] += 1
        messages = read.messages
        for index, message in enumerate(messages):
            if index == len(exchanges):
                if not sentinel or (message.headed and (message.target, index + 1) != (b"/sentinel", len(messages))):
                    raise Disagreement("httptools", "more requests", f"{len(messages)}, Pillion {len(exchanges)}")
                return
            compare("httptools", message, exchanges[index][0], sent[index], index < done)
        if not read.error and (sentinel or sum(message.whole for message in messages) < done):
            raise Disagreement("httptools", "fewer requests", f"{len(messages)}, Pillion {len(exchanges)}")
        if read.upgraded and not last.websocket:
            raise Disagreement("httptools", "an upgrade", repr(sent[-1][:200]))

    def _h11(self, whole: Requests, sent: list[bytes]) -> None:
        for index, (head, _) in enumerate(whole.exchanges):
            self.compared["h11"] += 1
            done = index < whole.done
            read = h11_request(sent[index] + SENTINEL if done else sent[index])
            if read is None:
                self.compared["h11-refused"] += 1
                continue
            message, rest = read
            compare("h11", message, head, sent[index], done)
            if done and rest != SENTINEL:
                raise Disagreement("h11", "another end", repr(rest[:100]))


def _as_it_came(head: RequestHead, sent: bytes) -> bytes:
    """What the client says of its own connection is not passed on; all else is."""
    if not sent.startswith(head.onward):
        raise Disagreement("pillion", "forwards other bytes than came", repr(sent[:300]))
    if head.last:
        again = parse_request(head.onward)
        if not again.keep or again.fields != [field for field in head.fields if field != (b"connection", field[1])]:
            raise Disagreement("pillion", "takes out more than one field", repr(head.onward[:300]))
    return head.raw + sent[len(head.onward) :]


def _same_with_headers_added(head: RequestHead) -> None:
    """The one place where a head is written anew must leave the rest as it was, and the client's claims out."""
    if len(head.fields) > FIELDS_MAX - len(ADDED):
        return
    head = parse_request(head.onward)
    again = parse_request(with_headers(head, ADDED, SOURCE, "spiffe://mesh.local/ns/a/sa/b"))
    for field in ("method", "target", "host", "version", "framing", "close", "keep", "expect", "websocket"):
        if getattr(head, field) != getattr(again, field):
            raise Disagreement("pillion", f"another {field} with headers added", repr(again.raw[:300]))
    ours = [(name, value) for name, value in head.fields if name.replace(b"_", b"-") != CERTIFICATE]
    kept = [(name, value) for name, value in again.fields if name.replace(b"_", b"-") != CERTIFICATE][: len(ours)]
    if ours != kept:
        raise Disagreement("pillion", "other fields with headers added", repr(again.raw[:300]))
    claims = [value for name, value in again.fields if name.replace(b"_", b"-") == CERTIFICATE]
    if len(claims) != 1 or SOURCE.encode() not in claims[0]:
        raise Disagreement("pillion", "passes on what a client says of its certificate", repr(again.raw[:300]))


def compare(reader: str, message: Message, head: RequestHead, sent: bytes, whole: bool) -> None:
    """One request as read there and here. Raises Disagreement."""
    if not message.headed:
        return
    if message.method != head.method.encode():
        raise Disagreement(reader, "another method", f"{message.method!r}, Pillion {head.method!r}")
    if message.target != head.target:
        raise Disagreement(reader, "another target", f"{message.target!r}, Pillion {head.target!r}")
    ours = [value for name, value in head.fields if name == b"host"]
    if message.host != ours:
        raise Disagreement(reader, "another host", f"{message.host!r}, Pillion {ours!r}")
    if message.whole and not whole:
        raise Disagreement(reader, "ends earlier", repr(sent[-200:]))
    if message.whole and message.length != body_bytes(head.framing, sent[len(head.onward) :]):
        raise Disagreement(reader, "another body", f"{message.length} bytes of {sent[len(head.onward) :][:200]!r}")
