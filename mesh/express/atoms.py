"""What the routes and policies of a destination read of a request: each test once, with the matcher that decides it.

A test is compiled a second time, into an automaton (`walk`); `check` holds both to the same answer on a text for every
state of it, and the one that counts is the matcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mesh import matching
from mesh.express import regex
from mesh.express.automata import ANY, Grammar, Nfa, Spot, Walk, determinise
from mesh.routing import Entry
from mesh.rules import Clause

Test = Callable[[str], bool]


class Atom(NamedTuple):
    """``kind``: Exact, PathPrefix or RegularExpression as in routes; Pattern as in policies."""

    kind: str
    value: str


@dataclass(slots=True)
class Reads:
    """What is read. ``headers``: by lower-case name; a header without tests is only asked to be there."""

    methods: set[str] = field(default_factory=set)
    paths: dict[Atom, Test] = field(default_factory=dict)
    hosts: dict[Atom, Test] = field(default_factory=dict)
    headers: dict[str, dict[Atom, Test]] = field(default_factory=dict)
    addresses: bool = False

    def entry(self, entry: Entry) -> None:
        """Adds what a compiled match of a route reads."""
        if entry.method is not None:
            self.methods.add(entry.method)
        if entry.path is not None and entry.spec.path is not None:
            self.paths[Atom(entry.spec.path.type, entry.spec.path.value)] = entry.path
        if entry.host is not None:
            _pattern(self.hosts, entry.host)
        for spec, (name, test) in zip(entry.spec.headers, entry.headers, strict=True):
            self.headers.setdefault(name, {})[Atom(spec.type, spec.value)] = test

    def clause(self, clause: Clause) -> None:
        """Adds what a compiled rule of a policy reads."""
        asked = clause.operation
        self.methods.update(asked.methods, asked.not_methods)
        for path in (*asked.paths, *asked.not_paths):
            _pattern(self.paths, path)
        for host in (*asked.hosts, *asked.not_hosts):
            _pattern(self.hosts, host)
        for name, wanted in asked.headers:
            tests = self.headers.setdefault(name, {})
            if wanted is not None:
                tests[Atom("Exact", wanted)] = wanted.__eq__
        self.addresses = self.addresses or bool(clause.blocks or clause.not_blocks)


def _pattern(tests: dict[Atom, Test], pattern: str) -> None:
    tests[Atom("Pattern", pattern)] = lambda text: matching.matches_pattern(pattern, text)


class Disagreement(Exception):
    """An automaton and the matcher it stands for read a text differently: a fault of ours."""


def walk(tests: dict[Atom, Test], grammar: Grammar) -> Walk:
    """The tests' automaton over the grammar's texts; bit ``i`` of what matches is the ``i``-th test.
    Raises NotRegular, TooLarge, Disagreement."""
    nfa = Nfa()
    for number, atom in enumerate(tests):
        _add(nfa, atom, 1 << number)
    found = determinise(nfa, grammar)
    check(tests, found.spots)
    return found


def check(tests: dict[Atom, Test], spots: Iterable[Spot]) -> None:
    """Raises Disagreement."""
    numbered = list(enumerate(tests.values()))
    for spot in spots:
        text = spot.witness.decode("latin-1")
        for number, test in numbered:
            if test(text) is not bool(spot.matched >> number & 1):
                raise Disagreement(f"{list(tests)[number].value!r} on {text!r}")


def _add(nfa: Nfa, atom: Atom, accepts: int) -> None:
    kind, value = atom
    if kind == "RegularExpression":
        regex.add(nfa, value, accepts)
        return
    try:
        text = value.encode("latin-1")
    except UnicodeEncodeError:  # no head holds it
        return
    if kind == "PathPrefix":
        bare = text.rstrip(b"/")
        last = nfa.chain(nfa.start(0 if bare else accepts), bare, accepts=accepts)
        nfa.chain(last, b"/", accepts=accepts, loop=True)
    elif kind == "Exact" or b"*" not in (text[:1], text[-1:]):
        nfa.chain(nfa.start(0 if text else accepts), text, accepts=accepts)
    elif text == b"*":
        nfa.step(nfa.start(), ANY, nfa.item(accepts, loop=True))
    elif text.endswith(b"*"):
        nfa.chain(nfa.start(), text[:-1], accepts=accepts, loop=True)
    else:
        nfa.chain(nfa.start(loop=True), text[1:], accepts=accepts)
