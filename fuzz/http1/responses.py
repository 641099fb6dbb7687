"""Target http1-responses: a server's bytes. What the client is given is the same response to every reader, and an
upstream connection goes back to its pool only if nobody could read on in it."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from random import Random

from fuzz.http1 import grammar
from fuzz.http1.reading import Httptools, Message, Responses, body_bytes, h11_responses
from fuzz.http1.requests import H11_EVERY, splits
from fuzz.target import Disagreement, Target
from l7proxy.http1.added import last_answer
from l7proxy.http1.exchange import RAW
from l7proxy.http1.head import NO_BODY, UNTIL_CLOSE, Heads, ResponseHead

SENTINEL = b"HTTP/1.1 299 Sentinel\r\nContent-Length: 0\r\n\r\n"


class HttpResponses(Target):
    """A case is a request and, after its blank line, what the server sends."""

    name = "http1-responses"
    tokens = grammar.TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()
        self.count = 0
        self.compared = {"accepted": 0, "httptools": 0, "h11": 0, "httptools-refused": 0, "h11-refused": 0}

    def generate(self, rng: Random) -> bytes:
        return grammar.responses(rng)

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:
        end = case.find(b"\r\n\r\n") + 4
        request, data = case[:end], case[end:]
        if end < 4 or not data or not _asks(request):
            return None
        whole = self._run(self.heads, request, [data])
        for cuts in splits(data, deep):
            edges = (0, *cuts, len(data)) if cuts else range(len(data) + 1)
            parts = self._run(Heads(), request, [data[a:b] for a, b in pairwise(edges) if a < b])
            self._same(whole, parts, cuts)
        told = b"".join(whole.told)
        signature = (whole.reply, whole.ends, whole.reusable, whole.switched, whole.interim, whole.status)
        if whole.reply and whole.reply[1] != "cut":  # the proxy's own answer, after nothing else
            if whole.reply[1] != "bad_response" and whole.reply[1] != "upstream_reset":
                raise Disagreement("pillion", "another reason", str(whole.reply))
            return signature
        if whole.last and told:
            told = self._as_it_came(data, told)
        if not data.startswith(told):
            raise Disagreement("pillion", "forwards other bytes than came")
        if whole.switched or not told:
            return signature
        self.count += 1
        self.compared["accepted"] += 1
        self._compare(whole, request, told, h11=deep or self.count % H11_EVERY == 0)
        return signature

    def _as_it_came(self, data: bytes, told: bytes) -> bytes:
        """What was told, with the final head as the server sent it: its word about its connection is not the client's."""
        at = 0
        while (end := data.find(b"\r\n\r\n", at) + 4) >= 4:
            head = self.heads.response(data[at:end])
            if head.status >= 200:
                said = last_answer(head)
                return data[:end] + told[at + len(said) :] if told.startswith(data[:at] + said) else told
            at = end
        return told  # cut off before it

    def _run(self, heads: Heads, request: bytes, pieces: list[bytes]) -> Run:
        run = Run(heads)
        run.client_data(request)
        for piece in pieces:
            run.upstream_data(piece)
        run.switched = run.rs == RAW
        run.upstream_eof()
        return run

    def _same(self, whole: Run, parts: Run, cuts: tuple[int, ...]) -> None:
        if (whole.reply, whole.switched, whole.status) != (parts.reply, parts.switched, parts.status):
            raise Disagreement("pillion", "another end when cut", f"at {cuts}: {whole.reply} then {parts.reply}")
        ours, theirs = b"".join(whole.told), b"".join(parts.told)
        # of a broken body, what came before the fault may have gone on; an answer of the proxy's own may have other words
        same = ours == theirs if whole.reply is None else whole.reply[1] != "cut" or theirs.startswith(ours)
        if not same:
            raise Disagreement("pillion", "forwards other bytes when cut", f"at {cuts}")

    def _compare(self, whole: Run, request: bytes, told: bytes, *, h11: bool) -> None:
        method, at = request.partition(b" ")[0], 0
        expected: list[tuple[int, int | None]] = []  # status and, when known, bytes of body
        final: ResponseHead | None = None
        while final is None and (end := told.find(b"\r\n\r\n", at) + 4) >= 4:
            head = self.heads.response(told[at:end])
            at = end
            if head.status < 200:
                expected.append((head.status, 0))
            else:
                final = head
        ended = True  # only a final response may wait for its end
        if final is not None:
            framing = NO_BODY if method == b"HEAD" or final.status in (204, 304) else final.framing
            expected.append((final.status, body_bytes(framing, told[at:]) if whole.done else None))
            ended = whole.done == 1 and framing != UNTIL_CLOSE
        if method != b"HEAD":  # llhttp cannot be told what was asked
            self.compared["httptools"] += 1
            read = Httptools(told + SENTINEL if whole.reusable else told, response=True)
            self.compared["httptools-refused"] += bool(read.error)
            self._same_messages("httptools", read.messages, expected, ended, told, bool(read.error), bool(whole.reusable))
        if h11:
            self.compared["h11"] += 1
            found = h11_responses(method, told + SENTINEL if whole.reusable else told)
            if found is None:
                self.compared["h11-refused"] += 1
                return
            self._same_messages("h11", found[0], expected, ended, told, False, False)
            if whole.reusable and found[1] != SENTINEL:
                raise Disagreement("h11", "another end", repr(found[1][:100]))

    def _same_messages(
        self, reader: str, messages: list[Message], expected: list[tuple[int, int | None]], ended: bool, told: bytes, error: bool,
        sentinel: bool,
    ) -> None:  # fmt: skip
        for index, message in enumerate(messages):
            if not message.headed:
                continue
            if index == len(expected):
                if not sentinel or message.status != 299:
                    raise Disagreement(reader, "more responses", f"{len(messages)}, Pillion {len(expected)}")
                return
            status, length = expected[index]
            last = index == len(expected) - 1
            if message.status != status:
                raise Disagreement(reader, "another status", f"{message.status}, Pillion {status}")
            if message.whole and last and not ended:
                raise Disagreement(reader, "ends earlier", repr(told[-200:]))
            if length is not None and message.length != length and not error:
                raise Disagreement(reader, "another body", f"{message.length} bytes, Pillion {length}")
        if ended and not error and (len(messages) < len(expected) or not messages[-1].whole):
            raise Disagreement(reader, "ends later", repr(told[-200:]))
        if sentinel and not error:
            raise Disagreement(reader, "fewer responses", f"{len(messages)}, Pillion {len(expected)}")


class Run(Responses):
    """Remembers the status the cycle understood."""

    __slots__ = ("status",)

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.status = 0

    def finished(self, status: int, why: str) -> None:
        super().finished(status, why)
        self.status = status


def _asks(request: bytes) -> bool:
    return request in grammar.ASKED
