"""What each identity takes of this worker, against what it may: gauges and rates as plain numbers on an `Account` that
sessions hold, and whose turn it is. No I/O; the clock and the loop's `call_soon` are given.

An identity that has used its share of a turn waits for the next one, but only while another is at work too: what it has
to do is put off (`defer`), its sockets are not read meanwhile, and the loop looks at everybody else's in between.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from mesh.budgets import BudgetTable
from mesh.model import CONFIG_KEY, Budget, Config, IdentityBudget, State

TURN_S = 0.0001  # of the worker's time; an identity's share of it is what others may have to wait for
ALONE_S = 0.0005  # who is alone at work has this much until it is seen whether another came
BUSY_S = 1.0  # who was active this long ago counts as at work
CALM_S = 5.0  # and for so long nobody had to wait for another: there is no crowd any more
EMPTY_S = 0.001
BURST_S = 1.0  # a rate's worth of this may come at once
UNKNOWN = 0
TOLD_PER_S_MAX = 50  # denials of one identity in the flow log


class Deferred(Protocol):
    """What waits for its identity's next turn."""

    def proceed(self) -> None: ...


class Due:
    """Something to do that an account pays for."""

    __slots__ = ("_account", "_call")

    def __init__(self, account: Account, call: Callable[[], None]) -> None:
        self._account, self._call = account, call

    def proceed(self) -> None:
        account = self._account
        before, started = account.spent, perf_counter()
        self._call()
        account.spent = max(account.spent, before + perf_counter() - started)  # parts of it may have been counted


class Rate:
    """So many a second, a second's worth at once."""

    __slots__ = ("_at", "_interval", "_room")

    def __init__(self, per_s: float) -> None:
        self._at = 0.0
        self.change(per_s)

    def change(self, per_s: float) -> None:
        self._interval = 1.0 / per_s
        self._room = BURST_S - self._interval / 2

    def take(self, now: float) -> bool:
        """False: too soon, and nothing is taken."""
        at = self._at
        if at < now:
            at = now
        elif at - now > self._room:
            return False
        self._at = at + self._interval
        return True

    def empty(self, now: float) -> None:
        """Elsewhere all was taken: for a moment there is none here either."""
        self._at = max(self._at, now + BURST_S + EMPTY_S)


class Account:
    """One identity on this worker."""

    __slots__ = (
        "active_at", "budget", "budgets", "connections", "crowded", "descriptors", "handshakes", "handshaking", "held", "limit",
        "quota", "refused", "requesting", "requests", "seen", "shut", "spent", "spiffe", "told", "waiting",
    )  # fmt: skip

    def __init__(self, budgets: Budgets, spiffe: str, budget: Budget) -> None:
        self.budgets, self.spiffe = budgets, spiffe
        self.connections = self.descriptors = self.held = 0  # now; held: bytes
        self.requests = self.handshakes = 0  # ever
        self.refused: Counter[str] = Counter()
        self.spent = self.seen = 0.0  # seconds of the worker, and as they were when someone looked
        self.active_at = float("-inf")
        self.limit = 0.0  # of `spent`, in this turn
        self.shut = False  # until its next turn
        self.crowded = False  # when it last used up its turn, another was at work
        self.told = 0
        self.waiting: deque[Deferred] = deque()
        self.requesting, self.handshaking = Rate(budget.requests_per_s), Rate(budget.handshakes_per_s)
        self.budget = budget
        self.quota = TURN_S * budget.worker_share

    def adopt(self, budget: Budget) -> None:
        if budget != self.budget:
            self.budget = budget
            self.quota = TURN_S * budget.worker_share
            self.requesting.change(budget.requests_per_s)
            self.handshaking.change(budget.handshakes_per_s)

    # ---- what it may; a refusal is counted here, and by who asked in the worker's metrics

    def refuse(self, reason: str) -> str:
        self.refused[reason] += 1
        return reason

    def request(self, now: float) -> bool:
        """One more request, opaque connection or stream. ``now``: of the clock."""
        self.requests += 1
        if self.requesting.take(now):
            return True
        self.refused["budget_requests"] += 1
        return False

    def handshake(self) -> bool:
        self.handshakes += 1
        if self.handshaking.take(self.budgets.clock()):
            return True
        self.refused["budget_handshakes"] += 1
        return False

    def connect(self, descriptors: int, *, asks: bool) -> str:
        """One more connection with so many sockets is counted, or the reason why not. ``asks``: it is a request too."""
        budget = self.budget
        if self.connections >= budget.connections:
            return self.refuse("budget_connections")
        if self.descriptors + descriptors > budget.descriptors:
            return self.refuse("budget_descriptors")
        if self.overfull:
            return self.refuse("budget_bytes")
        if asks and not self.request(self.budgets.clock()):
            return "budget_requests"
        self.connections += 1
        self.descriptors += descriptors
        return ""

    @property
    def overfull(self) -> bool:
        return self.held > self.budget.bytes_in_flight

    # ---- its turn

    def over(self) -> bool:
        """Asked when `spent` is past `limit`: whether to wait. If so, `defer` what there is to do."""
        return self.shut or self.budgets.contended(self)

    def defer(self, work: Deferred) -> None:
        self.waiting.append(work)
        self.budgets.arm(self)

    def when_due(self, call: Callable[[], None]) -> None:
        """Now, or in its next turn. What it costs is counted."""
        due = Due(self, call)
        if self.spent > self.limit and self.over():
            self.defer(due)
        else:
            due.proceed()


class Budgets:
    """All accounts of a worker. ``call_soon``: the loop's, so that ready sockets are looked at in between."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object], clock: Callable[[], float] = perf_counter) -> None:
        self._call_soon, self.clock = call_soon, clock
        self._table = BudgetTable(Budget(), "", ())
        self.accounts: dict[int, Account] = {}
        self.streams_of: Callable[[str], int] = lambda _spiffe: 0  # HBONE streams open, by whoever keeps them
        self._crowded: list[Account] = []
        self._armed = False
        self._crowd_at = float("-inf")
        self.crowd = False  # several identities are at work, and one has had to wait for its turn
        self.on_crowd: Callable[[bool], object] = lambda _crowd: None

    def of(self, identity: int, spiffe: str | None) -> Account:
        """The account to count on; look it up once and keep it. Who is not known shares one."""
        if not spiffe:
            identity = UNKNOWN
        found = self.accounts.get(identity)
        if found is None:
            name = spiffe if spiffe and identity else ""
            found = self.accounts[identity] = Account(self, name, self._table.of(name))
        return found

    def adopt(self, state: State) -> None:
        """A new configuration."""
        config = state.get(CONFIG_KEY)
        default, root = (config.budgets, config.root_namespace) if isinstance(config, Config) else (Budget(), "")
        self._table = BudgetTable(default, root, (item for item in state.values() if isinstance(item, IdentityBudget)))
        for account in self.accounts.values():
            account.adopt(self._table.of(account.spiffe))

    def sweep(self, known: Callable[[str], bool]) -> None:
        """Once a second. ``known``: whether an identity still exists."""
        if self.crowd and self.clock() - self._crowd_at > CALM_S:
            self.crowd = False
            self.on_crowd(False)
        for identity, account in list(self.accounts.items()):
            account.told = 0
            idle = not (account.connections or account.descriptors or account.held or account.waiting)
            if idle and account.spiffe and not known(account.spiffe):
                del self.accounts[identity]

    def may_tell(self, spiffe: str) -> bool:
        """Whether one more denial of an identity is told in this second: it is counted in any case."""
        for account in self.accounts.values():
            if account.spiffe == spiffe:
                account.told += 1
                return account.told <= TOLD_PER_S_MAX
        return True

    # ---- turns

    def contended(self, account: Account) -> bool:
        """Whether anybody else was at work lately. If not, the account's turn goes on."""
        now, busy = self.clock(), False
        for other in self.accounts.values():
            if other.spent != other.seen:
                other.seen, other.active_at = other.spent, now
            busy |= other is not account and now - other.active_at < BUSY_S
        account.crowded = busy
        if busy:
            account.shut, self._crowd_at = True, now
            if not self.crowd:
                self.crowd = True
                self.on_crowd(True)
        else:
            account.limit = account.spent + max(account.quota, ALONE_S)
        return busy

    def arm(self, account: Account) -> None:
        if account not in self._crowded:
            self._crowded.append(account)
        if not self._armed:
            self._armed = True
            self._call_soon(self.turn)

    def turn(self) -> None:
        """Everybody who waits gets a turn."""
        self._armed = False
        crowded, self._crowded = self._crowded, []
        for account in crowded:
            account.shut = False
            account.limit = account.spent + account.quota
            waiting = account.waiting
            while waiting and account.spent <= account.limit:
                waiting.popleft().proceed()
            if waiting:
                account.shut = True
                self.arm(account)
