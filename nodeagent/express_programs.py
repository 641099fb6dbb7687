"""Which programs the kernel runs over request heads: one for each caller's identity and service port that paired
connections use, compiled when first asked for and anew for each state. A program keeps its number, its endpoints their
place in it and its verdicts their names for as long as the agent runs, so that pairs and counters outlive a change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import structlog

from mesh.budgets import Budget, BudgetTable
from mesh.express.dfa import Table
from mesh.express.program import IP_CONDITION, Refusal, compile_program
from mesh.express.program import Program as Compiled
from mesh.express.response import RESPONSE
from mesh.model import CONFIG_KEY, Config, Identity, IdentityBudget, Service, State, Workload
from mesh.policy import Peer, PolicySet
from mesh.routing import RouteTable
from nodeagent.express_path import Verdict

log = structlog.get_logger()

PROGRAMS_MAX = 4095  # PL_X_PROGRAMS less the first
ENDPOINTS_MAX = 8  # PL_X_SLOTS
ADDRESSED_MAX = 1024  # of them for a single address: these come and go with workloads, and numbers are not given again
NAMES_MAX = 65_535  # of one program: u16

Endpoint = tuple[str, int]  # workload key, port


class Kernel(Protocol):
    """What of `express_path.ExpressPath` is used here. All may raise DatapathError."""

    def install(self, table: Table) -> int: ...
    def release(self, base: int) -> None: ...
    def put_program(
        self,
        index: int,
        *,
        generation: int,
        root: int,
        response: int,
        service: int,
        endpoints: Sequence[int],
        rate_per_s: int,
        burst: int,
        chooses: bool,
    ) -> None: ...
    def drop_program(self, index: int) -> None: ...
    def set_verdicts(self, index: int, verdicts: Mapping[tuple[int, int], Verdict]) -> None: ...


class Key(NamedTuple):
    """Who asks whom. ``service``: an item's key, of a workload where that is dialled by its own address; ``port``: as dialled;
    ``address``: the caller's, where rules read it, else "": whichever the identity has."""

    identity: int
    service: str
    port: int
    address: str = ""


class View:
    """One state, with the tables that deciding needs."""

    def __init__(self, state: State, generation: int, local: Mapping[str, int]) -> None:
        """``local``: this node's workloads by key, with the cookie of their netns."""
        self.state, self.generation, self.local = state, generation, local
        found = state.get(CONFIG_KEY)
        self.config = found if isinstance(found, Config) else Config(trust_domain="")
        self.routes, self.policies = RouteTable(state), PolicySet(state)
        named = (item for item in state.values() if isinstance(item, IdentityBudget))
        self.budgets = BudgetTable(self.config.budgets, self.config.root_namespace, named)
        self.services: dict[int, str] = {}
        self.vips: dict[str, str] = {}
        self.workloads: dict[int, str] = {}
        self.spiffe: dict[int, str] = {}
        self.by_address: dict[tuple[str, int], list[str]] = {}
        for key, item in state.items():
            if isinstance(item, Service):
                self.services[item.id] = key
                self.vips.update(dict.fromkeys(item.vips, key))
            elif isinstance(item, Identity):
                self.spiffe[item.id] = item.spiffe
            elif isinstance(item, Workload):
                self.workloads[item.id] = key
                for address in item.addresses if key in local else ():
                    for port in item.ports:
                        self.by_address.setdefault((address, port), []).append(key)

    def workload(self, key: str) -> Workload | None:
        item = self.state.get(key)
        return item if isinstance(item, Workload) else None

    def rate_per_s(self, spiffe: str) -> int:
        """Requests of one identity to one service, 0: any. The default protects workers, which what the kernel carries does
        not burden; one that an operator named is meant."""
        rate = self.budgets.of(spiffe).requests_per_s
        return rate if rate != Budget().requests_per_s else 0

    def dialled(self, address: str, port: int, service: int) -> str:
        """The key of what an application asked for, "": nothing here. ``service``: as the kernel noted then."""
        found = self.vips.get(address, "")
        if found:
            return found if found == self.services.get(service) else ""
        here = self.by_address.get((address, port), ())
        return here[0] if len(here) == 1 else ""

    def number(self, key: str) -> int:
        """The workload's id, 0 if it is gone."""
        found = self.workload(key)
        return found.id if found else 0


@dataclass(slots=True)
class Program:
    """One number of the kernel's. ``reason``: why user space carries all of it; "": the kernel does what it can."""

    index: int
    key: Key
    source: str  # the caller's SPIFFE ID
    reason: str = ""
    endpoints: list[Endpoint] = field(default_factory=list)  # by place; some it led to once
    current: tuple[Endpoint, ...] = ()  # what it leads to now
    names: list[tuple[str, str]] = field(default_factory=list)  # of verdicts: the rule that allows, the servers' SPIFFE ID
    states: int = 0
    digest: str = ""  # of its table, "": it has none
    base: int = 0
    by_address: bool = False  # rules read the caller's address: each has a program of its own

    def place(self, endpoint: Endpoint) -> int:
        """Of an endpoint it leads to now, -1 otherwise."""
        return self.endpoints.index(endpoint) if endpoint in self.current else -1


class Programs:
    """``moved`` is told of programs whose pairs no longer fit, before the kernel hears of anything."""

    def __init__(self, kernel: Kernel, moved: Callable[[Program], None], taken: Collection[int] = ()) -> None:
        """``taken``: numbers that records of a former agent name; what they meant then they must never mean again."""
        self._kernel, self._moved = kernel, moved
        self._numbers = (number for number in range(1, PROGRAMS_MAX + 1) if number not in taken)
        self.all: dict[Key, Program] = {}
        self._addressed = 0
        self.view: View | None = None
        self._shared: dict[str, tuple[int, int]] = {}  # digest of a table -> where it stands, how many use it
        self._response = RESPONSE.root_at(kernel.install(RESPONSE))

    def of(self, key: Key, address: str) -> Program | None:
        """The one for a caller at this address. None: as `get`."""
        found = self.get(key)
        return self.get(key._replace(address=address)) if found is not None and found.by_address else found

    def get(self, key: Key) -> Program | None:
        """Known or made now; None: there are too many, or no state yet."""
        found = self.all.get(key)
        if found is None and self.view is not None:
            if key.address and self._addressed >= ADDRESSED_MAX:
                return None
            number = next(self._numbers, 0)
            if not number:
                return None
            self._addressed += bool(key.address)
            found = self.all[key] = Program(number, key, self.view.spiffe.get(key.identity, "unknown"))
            self._compile(found, self.view)
        return found

    def move(self, view: View) -> None:
        """A new state is in force: whatever was decided under the last one is void."""
        self.view = view
        for program in self.all.values():
            self._compile(program, view)

    def _compile(self, program: Program, view: View) -> None:
        identity, service_key, port, address = program.key
        service = view.state.get(service_key)
        program.by_address = False
        try:
            compiled = compile_program(
                view.state,
                view.routes,
                view.policies,
                peer=Peer(view.spiffe.get(identity), identity, address),
                service_key=service_key,
                port=port,
                local=view.local,
            )
            if isinstance(compiled, Refusal):
                program.by_address = compiled.code == IP_CONDITION
                self._refuse(program, compiled.reason)
            else:
                self._put(program, compiled, view, service.id if isinstance(service, Service) else 0)
        except Exception as error:  # its connections stay in user space, which lacks nothing
            log.exception("express_not_compiled", service=service_key, port=port)
            self._refuse(program, f"not compiled: {error}")

    def _refuse(self, program: Program, reason: str) -> None:
        program.reason, program.states, program.current = reason, 0, ()
        self._kernel.drop_program(program.index)

    def _put(self, program: Program, compiled: Compiled, view: View, service: int) -> None:
        self._kernel.drop_program(program.index)  # what old rows and new verdicts make of each other must not matter
        places = self._places(program, compiled.endpoints)
        base = self._install(program, compiled.table)
        verdicts: dict[tuple[int, int], Verdict] = {}
        for situation, verdict in compiled.verdicts.items():
            groups = tuple((weight, _moved_mask(mask, places)) for weight, mask in verdict.groups)
            verdicts[situation] = Verdict(self._name(program, (verdict.rule, verdict.spiffe)), groups)
        self._kernel.set_verdicts(program.index, verdicts)
        rate = view.rate_per_s(program.source)
        self._kernel.put_program(
            program.index,
            generation=view.generation,
            root=compiled.table.root_at(base),
            response=self._response,
            service=service,
            endpoints=[view.number(end[0]) if end in compiled.endpoints else 0 for end in program.endpoints],
            rate_per_s=rate,
            burst=rate,  # a second's worth, as in the proxy
            chooses=any(mask & (mask - 1) for verdict in verdicts.values() for _, mask in verdict.groups),
        )
        program.reason, program.states, program.current = "", len(compiled.table.rows), compiled.endpoints

    def _places(self, program: Program, endpoints: tuple[Endpoint, ...]) -> list[int]:
        """Each endpoint's place; given to another only when none is left. The program's pairs are then asked to go; until
        they have, the kernel finds that their slots lead elsewhere."""
        unknown = [end for end in endpoints if end not in program.endpoints]
        if len(program.endpoints) + len(unknown) > ENDPOINTS_MAX:
            self._moved(program)
            program.endpoints, unknown = [], list(endpoints)
        program.endpoints += unknown
        return [program.endpoints.index(end) for end in endpoints]

    def _name(self, program: Program, name: tuple[str, str]) -> int:
        if name not in program.names:
            if len(program.names) >= NAMES_MAX:
                raise ValueError("too many rules had a say")
            program.names.append(name)
        return program.names.index(name)

    def _install(self, program: Program, table: Table) -> int:
        """Rows stand once for all programs with equal tables."""
        digest = table.digest
        if digest != program.digest:
            known = self._shared.get(digest)
            base, users = known if known is not None else (self._kernel.install(table), 0)
            self._shared[digest] = base, users + 1
            if program.digest:
                self._drop(program.digest)
            program.digest, program.base = digest, base
        return program.base

    def _drop(self, digest: str) -> None:
        base, users = self._shared[digest]
        if users > 1:
            self._shared[digest] = base, users - 1
        else:
            del self._shared[digest]
            self._kernel.release(base)


def _moved_mask(mask: int, places: list[int]) -> int:
    """A mask of the compiler's endpoints as one of the program's places."""
    return sum(1 << place for number, place in enumerate(places) if mask >> number & 1)
