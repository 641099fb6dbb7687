"""Which backend a request to a service goes to: Gateway API's HTTPRoute attached to services.

Precedence of matches, as the Gateway API orders them: host name (exact, then the longest wildcard, then none), exact
path, longest prefix by element, regular expression; a method; more headers; the older route, the route's name, the
rule's place. A service without routes is its own backend. Where routes attach and none matches, there is no route (404).

The table is compiled once for a State. Requests of one service, port, method, host and path take one look-up the second
time, unless header matches are in play.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from mesh import matching
from mesh.matching import Headers
from mesh.model import Backend, HeaderMatch, PathMatch, Route, RouteMatch, RouteRule, Service, State
from mesh.policy import L7Fields

CACHE_ENTRIES_MAX = 8192  # for each service port; dropped as a whole when full, as paths come from outside
CACHE_PATH_CHARS_MAX = 512  # longer paths are matched anew


class RequestView(Protocol):
    """What routing reads; `mesh.policy.Request` is one. ``path`` may carry a query."""

    @property
    def method(self) -> str | None: ...
    @property
    def path(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def headers(self) -> Headers: ...


class Rng(Protocol):
    """`random.Random` is one."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """``rule`` is "ns/name#index", or "" where the service is its own backend; ``port`` is the backend service's."""

    rule: str
    service: str  # item key
    port: int


@dataclass(frozen=True, slots=True)
class NoRoute:
    """``reason``: no_match (404); no_backend (500: the rule names none with weight), backend_missing (500: the
    service or its port does not exist), unknown_service (the asked service or port itself does not)."""

    rule: str
    reason: str


Outcome = Decision | NoRoute


@dataclass(frozen=True, slots=True)
class Choice:
    """The backends of a rule; ``only`` when there is nothing to draw."""

    outcomes: tuple[Outcome, ...]
    cumulative: tuple[int, ...]
    only: Outcome | None

    def pick(self, rng: Rng) -> Outcome:
        if self.only is not None:
            return self.only
        # random() < 1, so the index stays within; zero weights span nothing and are never met
        return self.outcomes[bisect_right(self.cumulative, int(rng.random() * self.cumulative[-1]))]


@dataclass(frozen=True, slots=True)
class Entry:
    """One match of one rule, compiled."""

    order: tuple[object, ...]
    host: str | None
    path: Callable[[str], bool] | None
    method: str | None
    headers: tuple[tuple[str, Callable[[str], bool]], ...]
    choice: Choice
    spec: RouteMatch  # what it was compiled from, for whoever compiles it to something else

    def matches(self, method: str | None, path: str, host: str, headers: Headers) -> bool:
        if self.method is not None and self.method != method:
            return False
        if self.path is not None and not self.path(path):
            return False
        if self.host is not None and not matching.matches_pattern(self.host, host):
            return False
        for name, test in self.headers:
            lines = matching.header_lines(headers, name)
            if not lines or not test(",".join(lines)):
                return False
        return True


class Port:
    """The compiled routes of one service port."""

    __slots__ = ("cache", "entries", "fields", "fixed", "sees_headers")

    def __init__(self, own: Outcome, entries: list[Entry], fields: L7Fields) -> None:
        self.entries = tuple(sorted(entries, key=_order))
        self.fixed = None if fields.paths or fields.methods or fields.hosts or fields.headers else self._first(own)
        self.fields = fields
        self.sees_headers = any(entry.headers for entry in self.entries)
        self.cache: dict[tuple[str | None, str, str], Choice | NoRoute] = {}

    def _first(self, own: Outcome) -> Choice:
        return self.entries[0].choice if self.entries else Choice((own,), (1,), own)

    def match(self, request: RequestView) -> Choice | NoRoute:
        """The first entry in precedence, from the cache where possible."""
        key = (request.method, request.path, request.host)
        if not self.sees_headers:
            known = self.cache.get(key)
            if known is not None:
                return known
        path, host = matching.without_query(request.path), matching.host_name(request.host)
        found: Choice | NoRoute = _NO_MATCH
        for entry in self.entries:
            if entry.matches(request.method, path, host, request.headers):
                found = entry.choice
                break
        if not self.sees_headers and len(request.path) <= CACHE_PATH_CHARS_MAX:
            if len(self.cache) >= CACHE_ENTRIES_MAX:
                self.cache.clear()
            self.cache[key] = found
        return found


_NO_MATCH = NoRoute("", "no_match")
_UNKNOWN = NoRoute("", "unknown_service")


class RouteTable:
    """The routes of a State by service and port."""

    def __init__(self, state: State) -> None:
        services = {key: item for key, item in state.items() if isinstance(item, Service)}
        attached: dict[str, list[tuple[int, Route]]] = {}
        for item in state.values():
            if isinstance(item, Route):
                for parent, wanted in item.parents:
                    attached.setdefault(parent, []).append((wanted, item))
        self._ports: dict[tuple[str, int], Port] = {}
        self._routed: set[tuple[str, int]] = set()
        compiled: dict[int, list[Entry]] = {}
        for key, service in services.items():
            for port in service.ports:
                routes = {id(route): route for wanted, route in attached.get(key, ()) if wanted in (0, port.port)}
                entries: list[Entry] = []
                for route in routes.values():
                    if id(route) not in compiled:
                        compiled[id(route)] = _compile(route, services)
                    entries += compiled[id(route)]
                if routes:
                    self._routed.add((key, port.port))
                self._ports[key, port.port] = Port(
                    Decision("", key, port.port), entries, _fields(list(routes.values())) if routes else L7Fields()
                )

    def routed(self, service_key: str, port: int) -> bool:
        """Whether any route attaches: the port then carries HTTP or nothing."""
        return (service_key, port) in self._routed

    def fields(self, service_key: str, port: int) -> L7Fields:
        """What the routes of a port read of a request."""
        known = self._ports.get((service_key, port))
        return known.fields if known else L7Fields()

    def port(self, service_key: str, port: int) -> Port | None:
        """The compiled port; None if the service or the port does not exist."""
        return self._ports.get((service_key, port))


def route(table: RouteTable, service_key: str, port: int, request: RequestView, rng: Rng) -> Outcome:
    """The backend for a request to ``port`` of a service. Draws by weight once for each request."""
    known = table.port(service_key, port)
    if known is None:
        return _UNKNOWN
    choice = known.fixed or known.match(request)
    if isinstance(choice, NoRoute):
        return choice
    return choice.only if choice.only is not None else choice.pick(rng)


def _order(entry: Entry) -> tuple[object, ...]:
    return entry.order


def _fields(routes: list[Route]) -> L7Fields:
    matches = [match for route in routes for rule in route.rules for match in rule.matches]
    paths = [match.path for match in matches if match.path is not None]
    every = [rule for route in routes for rule in route.rules if not rule.matches]
    return L7Fields(
        methods=any(match.method for match in matches),
        # A prefix of "/" matches every path, but a second entry besides it has to be chosen by something
        paths=any(not _is_root(path) for path in paths) or not (matches or every),
        hosts=any(route.hostnames for route in routes),
        headers=frozenset(header.name for match in matches for header in match.headers),
    )


def _is_root(path: PathMatch) -> bool:
    return path.type == "PathPrefix" and path.value == "/"


def _compile(route: Route, services: dict[str, Service]) -> list[Entry]:
    entries = []
    hosts: tuple[str | None, ...] = tuple(host.lower() for host in route.hostnames) or (None,)
    for number, rule in enumerate(route.rules):
        choice = _choice(f"{route.namespace}/{route.name}#{number}", rule, services)
        for match in rule.matches or (RouteMatch(),):
            path, rank, length = _path(match.path)
            for host in hosts:
                order = (
                    *_host_order(host),
                    rank,
                    -length,
                    match.method is None,
                    -len(match.headers),
                    route.created,
                    route.namespace,
                    route.name,
                    number,
                )
                headers = tuple((header.name, _header(header)) for header in match.headers)
                entries.append(Entry(order, host, path, match.method, headers, choice, match))
    return entries


def _host_order(host: str | None) -> tuple[int, int]:
    if host is None:
        return (2, 0)
    return (1, -len(host)) if host.startswith("*") else (0, -len(host))


def _path(path: PathMatch | None) -> tuple[Callable[[str], bool] | None, int, int]:
    """Test, rank and length. A prefix matches whole elements: /a matches /a and /a/b, not /ab."""
    if path is None or _is_root(path):
        return None, 1, 1
    value = path.value
    if path.type == "Exact":
        return (lambda text: text == value), 0, len(value)
    if path.type == "PathPrefix":
        bare = value.rstrip("/")
        below = bare + "/"
        return (lambda text: text == bare or text.startswith(below)), 1, len(bare)
    return matching.compile_regex(value), 2, len(value)


def _header(header: HeaderMatch) -> Callable[[str], bool]:
    if header.type == "RegularExpression":
        return matching.compile_regex(header.value)
    value = header.value
    return lambda text: text == value


def _choice(rule: str, spec: RouteRule, services: dict[str, Service]) -> Choice:
    weighted = [backend for backend in spec.backends if backend.weight > 0]
    if not weighted:
        none = NoRoute(rule, "no_backend")
        return Choice((none,), (1,), none)
    outcomes = tuple(_outcome(rule, backend, services) for backend in weighted)
    only = outcomes[0] if len(outcomes) == 1 else None
    return Choice(outcomes, tuple(accumulate(backend.weight for backend in weighted)), only)


def _outcome(rule: str, backend: Backend, services: dict[str, Service]) -> Outcome:
    service = services.get(backend.service)
    if service is None or all(port.port != backend.port for port in service.ports):
        return NoRoute(rule, "backend_missing")
    return Decision(rule, backend.service, backend.port)
