"""Strict heads. What is accepted here means the same to every HTTP/1.1 parser we know; all else is refused
and named, for a proxy that forwards raw bytes must never read them differently from the server behind it.

Heads repeat on keep-alive connections, so parsed ones are remembered by their raw bytes (`Heads`).
"""

from __future__ import annotations

import re

FIELDS_MAX = 128
LENGTH_DIGITS_MAX = 18  # of Content-Length: below 2**63
MEMO_HEADS_MAX = 2048
MEMO_HEAD_BYTES_MAX = 2048

NO_BODY, CHUNKED, UNTIL_CLOSE = 0, -1, -2  # framing; above zero: that many bytes

TCHAR = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
_FIELDS = rb"((?:[" + TCHAR + rb"]++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+)\r\n"
_REQUEST = re.compile(rb"([" + TCHAR + rb"]++) ([\x21-\x7e]++) HTTP/([0-9])\.([0-9])\r\n" + _FIELDS)
_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n" + _FIELDS)
_FIRST_BYTE = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_DIGITS = re.compile(rb"[0-9]{1,%d}" % LENGTH_DIGITS_MAX)
_HOST = re.compile(rb"(?:[A-Za-z0-9_~-]++(?:\.[A-Za-z0-9_~-]++)*+\.?|\[[0-9A-Fa-f:.]++\])(?::[0-9]{1,5})?")
_CODING_PADDED = re.compile(rb"(?i)\r\nTransfer-Encoding:[^\r]*[\t ]\r\n")  # llhttp: "chunked\t" is no chunked response
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp]://([^/?#]++)(/[^#]*+|\?[^#]*+|)")
# RFC 3986 pchar and "/" without ";", and upper-case percent-encoding of what could not stand for itself: one spelling each
_CANONICAL = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,=:@/]|%(?:2[0235]|3[CEF]|5[BDE]|60|7[B-D]|[89A-F][0-9A-F]))*+")
_CLOSE = re.compile(rb"(?i)\r\nConnection:[\t ]*close[\t ]*(?=\r\n)")
_FRAMING_NAMES = frozenset((b"content-length", b"transfer-encoding", b"host", b"connection", b"expect"))


class HeadError(Exception):
    """The sender of this head is at fault. ``status``: what to answer a request with; ``reason``: an enum's text."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.reason, self.detail = status, reason, detail


class RequestHead:
    """One accepted request head; shared between equal requests, so never changed."""

    __slots__ = (
        "close", "expect", "fields", "framing", "header", "host", "keep", "last", "memo", "method", "onward", "path",
        "path_fault", "plain", "raw", "safe", "target", "underscores", "version", "websocket",
    )  # fmt: skip

    raw: bytes
    onward: bytes  # what the server is sent
    method: str
    target: bytes
    path: str  # without query
    host: str  # as in Host, lower case, without port and final dot
    version: int  # 10 or 11
    fields: list[tuple[bytes, bytes]]  # lower-case names, values without outer white space
    header: dict[str, str | tuple[str, ...]]  # lower-case name -> value, or the value of each line
    framing: int
    close: bool  # the client asked to end after this
    keep: bool  # the connection may live on after this request
    last: bool  # the client ends its connection after this, by nothing but "close"; the server is not told: RFC 9110, 7.6.1
    expect: bool
    websocket: bool
    safe: bool  # idempotent and without a body: may be sent again
    plain: bool  # neither its own version, method nor fields change how an answer ends, and the server's connection lives on
    path_fault: str  # why the path is not canonical, or ""
    underscores: frozenset[str]  # field names with "_", in their "-" spelling
    memo: bool


class ResponseHead:
    """One accepted response head."""

    __slots__ = ("close", "framing", "keep_alive", "last_answer", "length", "plain", "raw", "status", "version", "websocket")

    raw: bytes
    last_answer: bytes  # with "connection: close" in place of what the server said of its own; made when asked for
    status: int
    version: int
    framing: int  # by its own fields, before method and status have their say; UNTIL_CLOSE when it has none
    length: int  # Content-Length or -1
    close: bool
    keep_alive: bool  # said so
    websocket: bool
    plain: bool  # final, of a length it says, and the connection lives on

    @classmethod
    def carried(cls, status: int, length: int) -> ResponseHead:
        """Of a response whose head was sent on elsewhere: HTTP/1.1, keep-alive, its length known."""
        head = cls()
        head.raw, head.status, head.version, head.framing, head.length = b"", status, 11, length, length
        head.last_answer = b""
        head.close, head.keep_alive, head.websocket, head.plain = False, True, False, False
        return head


def bad_start(data: bytes) -> bool:
    """True when no continuation can make ``data`` a head: junk, TLS, a bare LF in the first line, a leading CRLF."""
    if data[0] not in _FIRST_BYTE:
        return True
    newline = data.find(b"\n")
    return newline >= 0 and data[newline - 1] != 13


def _bad(detail: str) -> HeadError:
    return HeadError(400, "bad_request", detail)


def _split(block: bytes) -> list[tuple[bytes, bytes]]:
    lines = block.split(b"\r\n")
    if len(lines) > FIELDS_MAX + 1:
        raise HeadError(431, "head_too_large", f"more than {FIELDS_MAX} header fields")
    out = []
    for line in lines:
        if line:
            name, _, value = line.partition(b":")
            out.append((name.lower(), value.strip(b" \t")))
    return out


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip(b" \t").lower() for token in value.split(b",")]


def _length(value: bytes) -> int:
    if not _DIGITS.fullmatch(value):
        raise _bad("Content-Length is not a plain number")
    return int(value)


def _explain(raw: bytes) -> HeadError:
    """Why the request grammar did not match; slow path."""
    line, _, rest = raw.partition(b"\r\n")
    if b"\x00" in raw:
        return _bad("NUL in the head")
    if re.search(rb"(?<!\r)\n|\r(?!\n)", raw):
        return _bad("bare CR or LF in the head")
    if re.match(rb"[ \t]", rest) or re.search(rb"\r\n[ \t]", rest):
        return _bad("folded header line")
    if not re.fullmatch(rb"[^ ]+ [^ ]+ HTTP/[0-9]\.[0-9]", line):
        return _bad("malformed request line")
    return _bad("malformed header line or a byte that may not appear in a head")


def path_fault(path: bytes) -> str:
    """Why a path may be read differently by policy and server; "" when it is canonical."""
    if b"//" in path:
        return "empty path segment (//)"
    if b"/." in path and re.search(rb"/\.{1,2}(?:/|$)", path):
        return "dot segment (/. or /..)"
    if not _CANONICAL.fullmatch(path):
        return "path not in canonical form (percent-encoding, backslash, semicolon or a reserved byte)"
    return ""


def parse_request(raw: bytes) -> RequestHead:
    """``raw`` ends with its first CRLF CRLF. Raises HeadError."""
    match = _REQUEST.fullmatch(raw)
    if match is None:
        raise _explain(raw)
    method, target, major, minor, block = match.groups()
    if major != b"1" or minor not in b"01":
        raise HeadError(505, "http_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
    head = RequestHead()
    head.raw, head.target, head.memo = raw, target, False
    head.version = 10 if minor == b"0" else 11
    head.method = method.decode("ascii")
    head.fields = fields = _split(block)
    head.framing, length, chunked = NO_BODY, None, False
    host: bytes | None = None
    connection: list[bytes] = []
    upgrade: list[bytes] = []
    head.expect = False
    header: dict[str, str | tuple[str, ...]] = {}
    for name, value in fields:
        if name == b"content-length":
            if length is not None:
                raise _bad("two Content-Length fields")
            length = _length(value)
        elif name == b"transfer-encoding":
            if chunked or value.lower() != b"chunked" or _CODING_PADDED.search(raw):
                raise HeadError(400 if chunked else 501, "transfer_encoding", "only one Transfer-Encoding: chunked is understood")
            chunked = True
        elif name == b"host":
            if host is not None:
                raise _bad("two Host fields")
            if not _HOST.fullmatch(value):
                raise _bad("Host is not host[:port]")
            host = value
        elif name == b"connection":
            connection += _tokens(value)
        elif name == b"upgrade":
            upgrade += _tokens(value)
        elif name == b"http2-settings":
            raise _bad("upgrade to HTTP/2 is not offered")
        elif name == b"expect":
            if value.lower() != b"100-continue" or head.expect or head.version == 10:
                raise _bad("Expect other than one 100-continue")
            head.expect = True
        key, text = name.decode("ascii"), value.decode("latin-1")
        before = header.get(key)
        if before is None:
            header[key] = text
        else:
            header[key] = (before, text) if isinstance(before, str) else (*before, text)
    head.header = header
    if length is not None and chunked:
        raise _bad("Content-Length together with Transfer-Encoding")
    if chunked:
        if head.version == 10:
            raise _bad("Transfer-Encoding in HTTP/1.0")
        head.framing = CHUNKED
    elif length:
        head.framing = length
    if host is None and head.version == 11:
        raise _bad("Host is missing")
    if method == b"PRI":
        raise _bad("PRI is no method but the start of HTTP/2")
    if method == b"CONNECT":
        raise HeadError(501, "connect_method", "CONNECT is not offered")
    path = _path(method, target, host)
    head.path = path.decode("ascii")
    head.path_fault = "" if path == b"*" else path_fault(path)
    head.host = _without_port((host or b"").decode("ascii").lower())
    if not _FRAMING_NAMES.isdisjoint(connection):
        raise _bad("Connection names a field that frames the message")
    head.close = b"close" in connection
    head.keep = not head.close and (head.version == 11 or b"keep-alive" in connection)
    head.websocket = bool(upgrade)
    if upgrade and (
        upgrade != [b"websocket"] or b"upgrade" not in connection or method != b"GET" or head.version == 10 or head.framing
    ):
        raise _bad("Upgrade other than a plain websocket handshake")
    head.last = connection == [b"close"] and head.version == 11 and not upgrade
    head.onward = _CLOSE.sub(b"", raw, 1) if head.last else raw
    head.safe = head.framing == NO_BODY and method in (b"GET", b"HEAD", b"OPTIONS", b"TRACE") and not upgrade
    head.plain = (head.keep or head.last) and head.version == 11 and method != b"HEAD" and not upgrade
    head.underscores = frozenset(name.replace("_", "-") for name in header if "_" in name)
    return head


def _path(method: bytes, target: bytes, host: bytes | None) -> bytes:
    if target[:1] == b"/":
        if b"#" in target:
            raise _bad("fragment in the request target")
        return target.partition(b"?")[0]
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise _bad("request target is neither a path nor an http URL")
    if host is None or absolute[1].lower() != host.lower():
        raise _bad("absolute request target and Host disagree")
    return absolute[2].partition(b"?")[0] or b"/"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[: host.index("]") + 1]
    return host.partition(":")[0].removesuffix(".")


def parse_response(raw: bytes) -> ResponseHead:
    """``raw`` ends with its first CRLF CRLF. Raises HeadError with status 502: the server is at fault."""
    match = _RESPONSE.fullmatch(raw)
    if match is None:
        raise HeadError(502, "bad_response", "the server's response head is malformed")
    minor, status, block = match.groups()
    head = ResponseHead()
    head.raw, head.last_answer = raw, b""
    head.status = int(status)
    head.version = 10 if minor == b"0" else 11
    length, chunked = -1, False
    connection: list[bytes] = []
    upgrade: list[bytes] = []
    try:
        for name, value in _split(block):
            if name == b"content-length":
                if length >= 0:
                    raise _bad("two Content-Length fields")
                length = _length(value)
            elif name == b"transfer-encoding":
                if chunked or value.lower() != b"chunked" or head.version == 10 or _CODING_PADDED.search(raw):
                    raise _bad("Transfer-Encoding other than one chunked")
                chunked = True
            elif name == b"connection":
                connection += _tokens(value)
            elif name == b"upgrade":
                upgrade += _tokens(value)
    except HeadError as error:
        raise HeadError(502, "bad_response", f"the server's response is refused: {error.detail}") from None
    if chunked and length >= 0:
        raise HeadError(502, "bad_response", "the server's response has Content-Length and Transfer-Encoding")
    if (chunked or length > 0) and (head.status < 200 or head.status == 204):
        raise HeadError(502, "bad_response", f"the server's {head.status} response claims a body")
    head.length = length
    head.framing = CHUNKED if chunked else length if length >= 0 else UNTIL_CLOSE
    head.keep_alive = b"keep-alive" in connection
    head.close = b"close" in connection or (head.version == 10 and not head.keep_alive)
    head.websocket = upgrade == [b"websocket"] and b"upgrade" in connection
    head.plain = head.status >= 200 and head.status not in (204, 304) and head.framing >= 0 and not head.close
    return head


class Heads:
    """Parsed heads by their raw bytes; emptied when full, so it stays bounded and needs no bookkeeping per hit."""

    __slots__ = ("requests", "responses")

    def __init__(self) -> None:
        self.requests: dict[bytes, RequestHead] = {}
        self.responses: dict[bytes, ResponseHead] = {}

    def request(self, raw: bytes) -> RequestHead:
        """Remembered or parsed. Raises HeadError."""
        head = self.requests.get(raw)
        if head is None:
            head = parse_request(raw)
            if len(raw) <= MEMO_HEAD_BYTES_MAX:
                if len(self.requests) >= MEMO_HEADS_MAX:
                    self.requests.clear()
                head.memo = True
                self.requests[raw] = head
        return head

    def response(self, raw: bytes) -> ResponseHead:
        """Remembered or parsed. Raises HeadError."""
        head = self.responses.get(raw)
        if head is None:
            head = parse_response(raw)
            if len(raw) <= MEMO_HEAD_BYTES_MAX:
                if len(self.responses) >= MEMO_HEADS_MAX:
                    self.responses.clear()
                self.responses[raw] = head
        return head
