"""From a destination to its program: one table, and a verdict for everything the table tells apart.

Each text that rules read (method, path, host, headers) falls into classes: sets of texts for which the same tests hold. For
every combination of classes a witness request is made and the router and the evaluator are asked. Classes that are never
answered differently are joined; what is not allowed by every endpoint, or not this node's business, has no verdict, and the
table leaves it to user space.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod

from mesh.express import request as heads
from mesh.express.atoms import Atom, Disagreement, Test, walk
from mesh.express.automata import Grammar, Walk
from mesh.express.destination import (
    ENDPOINTS_MAX,
    Destination,
    Facts,
    Refusal,
    Verdict,
    destination_of,
    too_many_endpoints,
)
from mesh.express.dfa import Table, TooLarge
from mesh.express.machine import Run, run
from mesh.express.regex import NotRegular
from mesh.express.request import Part
from mesh.model import State
from mesh.policy import Peer, PolicySet, Request
from mesh.routing import RouteTable

__all__ = ["Program", "Refusal", "Verdict", "compile_program"]

COMBINATIONS_MAX = 4096  # of classes: requests the evaluator is asked
VERDICTS_MAX = 1024  # of one program
SEEN_BITS = 16
IP_CONDITION = "ip_condition"  # code of a refusal: with an address there may be a program
ABSENT = -1  # the class of a header that is not there

Combination = tuple[int, ...]  # class numbers: path, method, host, headers in order


@dataclass(frozen=True)
class Program:
    """What the kernel needs for one caller and one service port. ``verdicts``: by rule and `seen`; ``endpoints``: workload key
    and port, in the places the verdicts' bits mean; ``by_address``: rules read the caller's address, so that it holds for
    this one alone."""

    table: Table
    verdicts: Mapping[tuple[int, int], Verdict]
    endpoints: tuple[tuple[str, int], ...]
    by_address: bool

    @cached_property
    def digest(self) -> str:
        """Equal for programs that do the same."""
        text = repr((self.table.digest, sorted(self.verdicts.items(), key=_key), self.endpoints))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def read(self, head: bytes) -> tuple[Run, Verdict] | None:
        """What becomes of a message that starts with ``head``; None: user space decides."""
        found = run(self.table, head)
        verdict = self.verdicts.get((found.rule, found.seen)) if found else None
        return (found, verdict) if found and verdict else None


def _key(item: tuple[tuple[int, int], Verdict]) -> tuple[int, int]:
    return item[0]


class Refused(Exception):
    """No program; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(slots=True)
class Axis:
    """One text and its classes. ``witnesses``: a text of each class, None where a header is absent; ``matched``: what holds
    for the class, ABSENT likewise."""

    name: str
    walk: Walk | None
    matched: list[int]
    witnesses: list[str | None]


def compile_program(
    state: State,
    routes: RouteTable,
    policies: PolicySet,
    *,
    peer: Peer,
    service_key: str,
    port: int,
    local: Collection[str],
    caller: str = "",
) -> Program | Refusal:
    """The program for requests of ``peer`` to a service's port, or to that of a workload by its own address (``service_key`` is
    the workload's then). ``routes`` and ``policies`` are the State's. ``peer.address``
    is the address the data path sees, or "" where none is to be relied on. ``local``: keys of the workloads on this node;
    ``caller``: the peer's own, for its switch, or "" where the caller's switch is looked at elsewhere."""
    destination = destination_of(Facts(state, routes, policies), peer, service_key, port, local=local, caller=caller)
    refusal = destination.refusal()
    if refusal is not None:
        return refusal
    try:
        return _compile(destination)
    except Refused as error:
        return error.refusal
    except TooLarge:
        return Refusal("too_large", "its routes and rules make a larger table than the kernel is given")
    except Disagreement as error:
        return Refusal("disagreement", f"the table would not decide as user space does: {error}; please report this")


def _compile(destination: Destination) -> Program:
    reads, underscored = destination.reads()
    if reads.addresses and not destination.peer.address:
        raise Refused(Refusal(IP_CONDITION, "a rule asks for the caller's address: each address has a program of its own"))
    for name in sorted(reads.headers.keys() & heads.OWN):
        raise Refused(Refusal("framing_header", f"a rule reads header {name}, which the kernel reads for itself"))
    # What is never accepted is absent wherever something is
    asked = {name: tests for name, tests in sorted(reads.headers.items()) if name not in heads.PUNTED and "_" not in name}
    if len(asked) > heads.HEADERS_MAX:
        raise Refused(
            Refusal("too_many_headers", f"rules read {len(asked)} headers; the kernel reads at most {heads.HEADERS_MAX}")
        )
    axes = [
        _axis("path", _walked(reads.paths, heads.PATH, "path"), heads.PATH_ENDS),
        _methods(reads.methods),
        _axis("host", _walked(reads.hosts, heads.HOST_NAME, "host"), heads.HOST_ENDS),
        *(_header(name, tests) for name, tests in asked.items()),
    ]
    count = prod(len(axis.matched) for axis in axes)
    if count > COMBINATIONS_MAX:
        raise Refused(Refusal("too_many_conditions", f"rules tell {count} kinds of requests apart; at most {COMBINATIONS_MAX}"))
    answers: dict[Combination, Verdict] = {}
    refusals: Counter[Refusal] = Counter()
    for combination in product(*(range(len(axis.matched)) for axis in axes)):
        answer = destination.decide(_witness(destination.port, axes, combination))
        if isinstance(answer, Refusal):
            refusals[answer] += 1
        else:
            answers[combination] = answer
    if not answers:
        most = refusals.most_common(1)[0][0]
        raise Refused(Refusal(most.code, f"no request of this caller is the kernel's: {most.reason}"))
    _fit(destination, answers)
    return _assemble(destination, axes, answers, by_address=reads.addresses, underscores=not underscored)


def _fit(destination: Destination, answers: dict[Combination, Verdict]) -> None:
    """Endpoints that no verdict names give up their places."""
    used = 0
    for verdict in answers.values():
        for _, bits in verdict.groups:
            used |= bits
    places = [place for place in range(used.bit_length()) if used >> place & 1]
    if len(places) > ENDPOINTS_MAX:
        raise Refused(too_many_endpoints(len(places)))
    moved = {old: new for new, old in enumerate(places)}
    for combination, verdict in answers.items():
        groups = tuple(
            (weight, sum(1 << new for old, new in moved.items() if bits >> old & 1)) for weight, bits in verdict.groups
        )
        answers[combination] = replace(verdict, groups=groups)
    keys = list(destination.endpoints)
    destination.endpoints = {keys[old]: new for old, new in moved.items()}


def _walked(tests: dict[Atom, Test], grammar: Grammar, what: str) -> Walk:
    try:
        return walk(tests, grammar) if tests else _untested(what)
    except NotRegular:
        raise Refused(Refusal("regex", f"a regular expression for the {what} is of a kind the kernel does not take")) from None
    except TooLarge:
        raise Refused(
            Refusal("regex_too_large", f"the rules for the {what} make a larger automaton than the kernel is given")
        ) from None


@lru_cache
def _untested(what: str) -> Walk:
    return walk({}, {"path": heads.PATH, "host": heads.HOST_NAME}.get(what, heads.VALUE))


def _axis(name: str, found: Walk, ends: frozenset[int]) -> Axis:
    classes: dict[int, str | None] = {}
    for spot in found.spots:
        if spot.grammar in ends:
            classes.setdefault(spot.matched, spot.witness.decode("latin-1"))
    return Axis(name, found, list(classes), list(classes.values()))


def _header(name: str, tests: dict[Atom, Test]) -> Axis:
    axis = _axis(name, _walked(tests, heads.VALUE, f"header {name}"), heads.VALUE_ENDS)
    axis.matched.insert(0, ABSENT)
    axis.witnesses.insert(0, None)
    return axis


def _methods(named: set[str]) -> Axis:
    """The methods that rules name, and one for all the others."""
    told = [method for method in heads.METHODS if method in named]
    other = next((method for method in heads.METHODS if method not in named), None)
    witnesses: list[str | None] = [*told, *([other] if other else [])]
    return Axis("method", None, list(range(len(witnesses))), witnesses)


def _witness(port: int, axes: list[Axis], combination: Combination) -> Request:
    path, method, host, *values = (axis.witnesses[number] for axis, number in zip(axes, combination, strict=True))
    headers = {axis.name: value for axis, value in zip(axes[3:], values, strict=True) if value is not None}
    return Request(port, method, path or "/", host or "", headers)


def _join(place: int, size: int, answers: dict[Combination, Verdict]) -> dict[int, int]:
    """Class -> the first class that is answered the same whatever the other texts are; without those that have no verdict."""
    slices: list[dict[Combination, Verdict]] = [{} for _ in range(size)]
    for combination, verdict in answers.items():
        slices[combination[place]][combination[:place] + combination[place + 1 :]] = verdict
    first: dict[frozenset[tuple[Combination, Verdict]], int] = {}
    return {number: first.setdefault(frozenset(one.items()), number) for number, one in enumerate(slices) if one}


def _assemble(
    destination: Destination, axes: list[Axis], answers: dict[Combination, Verdict], *, by_address: bool, underscores: bool
) -> Program:
    values: list[dict[int, int]] = [{} for _ in axes]  # class -> what it adds to `seen`; of the path: the rule
    shift = 0
    # The host first: where no rule reads it, its bit is the same everywhere, and so is all of the table after the target
    for place in (0, 2, 1, *range(3, len(axes))):
        axis = axes[place]
        joined = _join(place, len(axis.matched), answers)
        # Numbered from 1 where nothing read must not look like something read: no path, no Host
        start = 1 if place in (0, 2) else 0
        numbers = {first: number for number, first in enumerate(dict.fromkeys(joined.values()), start)}
        if place == 0:
            values[place] = {one: numbers[first] for one, first in joined.items()}
            continue
        if place > 2 and joined.get(0) is None:
            # A head without the header has no verdict; it must not be met with another's number
            numbers = {first: number + 1 for first, number in numbers.items()}
        values[place] = {one: numbers[first] << shift for one, first in joined.items()}
        shift += max(numbers.values()).bit_length()
    if shift > SEEN_BITS:
        raise Refused(Refusal("too_many_conditions", "rules tell more values apart than the kernel keeps track of"))
    verdicts: dict[tuple[int, int], Verdict] = {}
    for combination, verdict in answers.items():
        rule, *seen = (of[number] for of, number in zip(values, combination, strict=True))
        verdicts[rule, sum(seen)] = verdict
    if len(verdicts) > VERDICTS_MAX:
        raise Refused(Refusal("too_many_conditions", f"{len(verdicts)} verdicts; the kernel is given at most {VERDICTS_MAX}"))
    endpoints = tuple(sorted(destination.endpoints, key=destination.endpoints.__getitem__))
    return Program(_table(axes, values, underscores=underscores), verdicts, endpoints, by_address)


def _table(axes: list[Axis], values: list[dict[int, int]], *, underscores: bool) -> Table:
    parts = []
    for axis, of in zip(axes, values, strict=True):
        if axis.walk is not None:
            told = tuple((axis.matched[number], value) for number, value in of.items() if axis.matched[number] != ABSENT)
            parts.append(Part(axis.walk, told))
    path, host, *others = parts
    named, bits = axes[1].witnesses, values[1]
    numbers = {method: named.index(method) if method in named else len(named) - 1 for method in heads.METHODS}
    methods = tuple((method, bits[number]) for method, number in numbers.items() if number in bits)
    headers = tuple((axis.name, part) for axis, part in zip(axes[3:], others, strict=True))
    return heads.table(methods, path, host, headers, underscores)
