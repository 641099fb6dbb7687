"""The patterns of policies and routes, compiled once into predicates."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping

from mesh.express.dfa import TooLarge
from mesh.express.regex import NotRegular, Pattern
from mesh.identity import SpiffeId
from mesh.model import Operation, Source

REGEX_CHARS_MAX = 256
REGEX_SUBJECT_CHARS_MAX = 2048  # a longer path or value matches no regular expression

Headers = Mapping[str, str | tuple[str, ...]]  # lower-case name -> value, or every line's value
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def matches_pattern(pattern: str, value: str) -> bool:
    """Exact, or ``*`` as the whole, the first or the last character. The whole is not empty."""
    if pattern == "*":
        return value != ""
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    return pattern == value


def any_pattern(patterns: tuple[str, ...], value: str) -> bool:
    """Whether one of the patterns matches."""
    return any(matches_pattern(pattern, value) for pattern in patterns)


def is_for(who: SpiffeId, namespace: str, principals: tuple[str, ...], root_namespace: str) -> bool:
    """Whether what a resource of ``namespace`` gives is for this identity: one of its namespace (of the root namespace: of any),
    and one of ``principals``, where some are named."""
    return namespace in (who.namespace, root_namespace) and (not principals or any_pattern(principals, who.principal))


def without_query(path: str) -> str:
    """The path as policies and routes see it."""
    return path.partition("?")[0]


def host_name(host: str) -> str:
    """A Host header's name: no port, no trailing dot, lower case. ``[::1]:80`` becomes ``[::1]``."""
    host = host.lower()
    if host.startswith("["):
        return host[: host.find("]") + 1] or host
    return host.partition(":")[0].removesuffix(".")


def header_lines(headers: Headers, name: str) -> tuple[str, ...]:
    """Every value of a header; none if it is absent."""
    value = headers.get(name)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def compile_blocks(blocks: tuple[str, ...]) -> tuple[IpNetwork, ...]:
    """CIDRs or single addresses. Raises ValueError."""
    return tuple(ipaddress.ip_network(block, strict=False) for block in blocks)


def in_blocks(blocks: tuple[IpNetwork, ...], address: str) -> bool:
    """Whether the address is in one of them; a v4-mapped one counts as IPv4. Raises ValueError for no address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip.version == block.version and ip in block for block in blocks)


def compile_regex(pattern: str) -> Callable[[str], bool]:
    """Whether the whole of a text matches, of a path or a header's value: the time grows with its length and no faster. Raises
    ValueError; see `check_regex` for what is refused."""
    walk = check_regex(pattern)
    if walk is None:
        match = re.compile(pattern).fullmatch
        return lambda text: len(text) <= REGEX_SUBJECT_CHARS_MAX and match(text) is not None

    def test(text: str) -> bool:
        try:
            return len(text) <= REGEX_SUBJECT_CHARS_MAX and walk(text.encode("latin-1"))
        except UnicodeEncodeError:  # no request has such a letter
            return False

    return test


def check_regex(pattern: str) -> Pattern | None:
    """None where `re` takes no longer than the text is long: the pattern leaves it one choice at most. Any other has to be
    walked. Raises ValueError for a pattern that is too long, broken or can not be walked, and for what was hardly meant: a repeat
    within a repeat, a reference back, a look around.
    """
    if len(pattern) > REGEX_CHARS_MAX:
        raise ValueError(f"regular expression of {len(pattern)} characters; at most {REGEX_CHARS_MAX}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if re.search(r"\(\?(?!:)|\\[1-9]", pattern):
        raise ValueError("only (?:…) of the (?…) forms is taken, and no reference back")
    if _repeats_repeat(pattern):
        raise ValueError("a repeat within a repeat, as in (a+)+, may take exponential time")
    if _unbounded(pattern) > 4:
        raise ValueError("more than four of *, + and {n,} may take too long on a hostile path")
    if _choices(pattern) < 2:
        return None
    try:
        return Pattern(pattern)
    except TooLarge:
        raise ValueError("too many letters, with its repeats written out; a simpler pattern will do") from None
    except NotRegular:
        raise ValueError("this may take too long on a hostile path; write a simpler pattern, without \\b and the like") from None


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|\(\?:|.", re.DOTALL)
_REPEATS = ("*", "+")


def _is_repeat(token: str) -> bool:
    return token in _REPEATS or (token.startswith("{") and len(token) > 2)


def _repeats_repeat(pattern: str) -> bool:
    """Whether a group that holds a repeat is itself repeated."""
    holds = [False]  # for each open group, innermost last
    closed = False  # the token before closed a group that holds a repeat
    for piece in _TOKEN.findall(pattern):
        if piece in ("(", "(?:"):
            holds.append(False)
            closed = False
        elif piece == ")":
            closed = holds.pop() if len(holds) > 1 else False
            holds[-1] = holds[-1] or closed
        elif _is_repeat(piece):
            if closed:
                return True
            holds[-1] = True
            closed = False
        else:
            closed = False
    return False


def _unbounded(pattern: str) -> int:
    return sum(token in _REPEATS or (token.startswith("{") and token.endswith(",}")) for token in _TOKEN.findall(pattern))


def _choices(pattern: str) -> int:
    """The places where a text may be read on in several ways."""
    return sum(token in ("|", "?") or _is_repeat(token) for token in _TOKEN.findall(pattern))


def matches_identity(source: Source, principal: str | None, namespace: str | None) -> bool:
    """The parts of a source that only the peer's identity decides; None: the peer has none."""
    if source.principals and (principal is None or not any_pattern(source.principals, principal)):
        return False
    if source.not_principals and principal is not None and any_pattern(source.not_principals, principal):
        return False
    if source.namespaces and (namespace is None or not any_pattern(source.namespaces, namespace)):
        return False
    return not (source.not_namespaces and namespace is not None and any_pattern(source.not_namespaces, namespace))


def matches_port(operation: Operation, port: int) -> bool:
    """The part of an operation that layer 4 decides."""
    return (not operation.ports or port in operation.ports) and port not in operation.not_ports


def has_l7(operation: Operation) -> bool:
    """Whether the operation asks for what only an HTTP request tells."""
    return bool(
        operation.methods
        or operation.not_methods
        or operation.paths
        or operation.not_paths
        or operation.hosts
        or operation.not_hosts
        or operation.headers
    )


def matches_l7(operation: Operation, method: str, path: str, host: str, headers: Headers, *, every_line: bool) -> bool:
    """The HTTP parts. ``path`` without query, ``host`` by `host_name`. ``every_line``: a header sent more than once
    must match in each line (for ALLOW); otherwise one line suffices (for DENY). Both err towards denial.
    """
    if operation.methods and method not in operation.methods:
        return False
    if operation.not_methods and method in operation.not_methods:
        return False
    if operation.paths and not any_pattern(operation.paths, path):
        return False
    if operation.not_paths and any_pattern(operation.not_paths, path):
        return False
    if operation.hosts and not any_pattern(operation.hosts, host):
        return False
    if operation.not_hosts and any_pattern(operation.not_hosts, host):
        return False
    for name, wanted in operation.headers:
        lines = header_lines(headers, name)
        if not lines:
            return False
        if wanted is not None and not (all if every_line else any)(line == wanted for line in lines):
            return False
    return True
