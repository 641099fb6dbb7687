"""The only place where a head is rewritten: headers a Service asks for (x-forwarded-client-cert, x-request-id, traceparent),
and the end of a connection that is to end."""

from __future__ import annotations

import os

from l7proxy.http1.head import RequestHead, ResponseHead

_REPLACED = frozenset((b"x-forwarded-client-cert",))  # the client's own word is not passed on
_PERSISTENCE = frozenset((b"connection", b"keep-alive"))


def with_headers(head: RequestHead, wanted: tuple[str, ...], source: str | None, destination: str) -> bytes:
    """The head with what is wanted put in front of the blank line. ``source``, ``destination``: SPIFFE URIs."""
    raw = head.onward
    lines: list[bytes] = []
    if "x-forwarded-client-cert" in wanted:
        if any(name.replace("_", "-") == "x-forwarded-client-cert" for name in head.header):
            raw = _without(raw, _REPLACED)
        if source is not None:
            lines.append(f"x-forwarded-client-cert: By={destination};URI={source}\r\n".encode("ascii"))
    if "x-request-id" in wanted and "x-request-id" not in head.header:
        noise = os.urandom(16).hex()
        lines.append(f"x-request-id: {noise[:8]}-{noise[8:12]}-{noise[12:16]}-{noise[16:20]}-{noise[20:]}\r\n".encode("ascii"))
    if "traceparent" in wanted and "traceparent" not in head.header:
        lines.append(f"traceparent: 00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01\r\n".encode("ascii"))
    return raw[:-2] + b"".join(lines) + b"\r\n"


def last_answer(head: ResponseHead) -> bytes:
    """The response head with ``connection: close`` in place of what the server said of its own connection."""
    if not head.last_answer:
        head.last_answer = _without(head.raw, _PERSISTENCE)[:-2] + b"connection: close\r\n\r\n"
    return head.last_answer


def _without(raw: bytes, names: frozenset[bytes]) -> bytes:
    first, *fields = raw[:-4].split(b"\r\n")
    kept = [line for line in fields if line.partition(b":")[0].lower().replace(b"_", b"-") not in names]
    return b"\r\n".join((first, *kept)) + b"\r\n\r\n"
