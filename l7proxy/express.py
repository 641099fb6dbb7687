"""What a paired session makes of the kernel's account of it, as pure functions: events and a view in, what to do out.

The kernel carries an exchange from its first byte on, or never: a session that rests looks at the view before it
believes any event. Whatever went through user space has latched the pair slow until it is armed again.
"""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from l7proxy.http1.exchange import Limits

ARM, HOLD, TAKE = 1, 2, 3  # enum pl_xarm_op
NO_SLOT = 0xFFFFFFFF  # PL_X_NO_SLOT: the client's part alone
RESTS, REQUEST_BODY, RESPONSE_HEAD, RESPONSE_BODY = range(4)  # enum pl_xphase
FUTILE_MAX = 64  # requests in a row that are not for this path
FUTILE = frozenset(
    ("head", "head_long", "head_part", "body", "verdict", "no_slot")
)  # reasons of the request's, which pass with nothing but the request
UNSETTLED = frozenset(("unsettled", "unclean"))  # reasons of an end that was not at rest when it was paired
UNSETTLED_TIMES = 4
ANSWER_BYTES_MAX = 256 << 10  # PL_X_BUDGET_BYTES: the kernel carries no longer one
FLAG_OFF = 1  # PL_XF_OFF: the application asked of its socket what this path can not keep
FLAG_INSIDE, FLAG_TORN, FLAG_ANSWERING = 4, 8, 16  # PL_XF_INSIDE, PL_XF_TORN, PL_XF_ANSWERING
LEG_NEW, LEG_WANTED, LEG_REFUSED, LEG_ASKED, LEG_MADE = range(5)  # `leg` of a connection; below: by a look of l7proxy/legs.py


class View(msgspec.Struct, frozen=True, gc=False):
    """The kernel's account of one pair. ``slot``: whose exchange runs, -1: none; ``started``: of the last one, by
    perf_counter; ``handed``: the server's bytes come through user space from here on."""

    slot: int
    phase: int = RESTS
    handed: bool = False
    handed_slow: int = 0  # bytes the server sent unasked before its answer
    status: int = 0
    head: bytes = b""
    req_left: int = 0
    resp_left: int = 0
    punt: str = ""  # why the last message came through user space
    started: float = 0.0
    off: bool = False
    began: int = 0  # the same by the kernel's clock: tells exchanges apart
    inside: bool = False  # a thread of the client's may be in send() still: an exchange may begin yet
    torn: bool = False  # ... with a part of a request, which nothing may overtake
    answering: bool = False  # a server's may be, with the end of the last answer

    @property
    def busy(self) -> bool:
        return self.slot >= 0

    @property
    def takes_body(self) -> bool:
        """What the client sends is the rest of the request."""
        return self.phase == REQUEST_BODY and self.req_left > 0

    @property
    def ended(self) -> bool:
        """Read after TAKE: the response was whole after all."""
        return self.status > 0 and not self.resp_left and not self.req_left


class Step(Enum):
    """What a session that rests does about an event."""

    PASS = auto()  # there is no exchange in the kernel: as if never paired
    ADOPT = auto()  # user space goes on with the kernel's exchange, then with the event
    WAIT = auto()  # HOLD, keep what came, look again
    UNASKED = auto()  # the server spoke out of turn


def client_spoke(view: View) -> Step:
    """Bytes of the client, or its FIN, while the session rests. The rest of a body the kernel could not deliver is
    the exchange's; all else is behind it."""
    if view.torn:
        return Step.WAIT
    if not view.busy:
        return Step.WAIT if view.answering else Step.PASS
    return Step.ADOPT if view.handed or view.takes_body else Step.WAIT


def server_spoke(view: View, slot: int) -> Step:
    """Bytes of one server, or its end once HOLD is set, while the session rests."""
    if view.slot != slot or not view.handed or view.handed_slow:
        return Step.UNASKED
    return Step.ADOPT


def waited(view: View, *, kept: bool = False) -> Step:
    """Another look after HOLD. ``kept``: bytes of the client's wait."""
    if view.inside or view.answering:
        return Step.WAIT
    if not view.busy:
        return Step.PASS
    return Step.ADOPT if view.handed or (kept and view.takes_body) else Step.WAIT


class Watch:
    """Whether what the kernel carries moves; asked now and then."""

    __slots__ = ("_mark", "_since")

    def __init__(self) -> None:
        self._mark: tuple[int, int, int, int] | None = None
        self._since = 0.0

    def late(self, view: View, now: float, limits: Limits) -> bool:
        """By the limits of user space: an answer within request_timeout_s, bodies without a gap of idle_timeout_s."""
        if not view.busy:
            self._mark = None
            return False
        if view.phase == RESPONSE_HEAD:
            return now - view.started > limits.request_timeout_s
        mark = (view.began, view.phase, view.req_left, view.resp_left)
        if mark != self._mark:
            self._mark, self._since = mark, now
        return now - self._since > limits.idle_timeout_s


class Futility:
    """A client whose requests the kernel can not carry pays for being asked about each: not for ever."""

    __slots__ = ("_began", "_count")

    def __init__(self) -> None:
        self._began = self._count = 0

    def punted(self, view: View) -> bool:
        """One more came through user space; whether that is enough."""
        if view.began != self._began or view.punt not in FUTILE:
            self._began, self._count = view.began, 0
        else:
            self._count += 1
        return self._count >= FUTILE_MAX


class Unsettled:
    """An end takes nothing from the kernel before it was seen at rest: all read, no thread asleep in recv(). A busy one is at
    rest for moments only, but while it is paired anew it stands still. That costs as much as dozens of exchanges, and an end
    may never rest: so after one exchange for this reason, after 4 more, 16 more."""

    __slots__ = ("_left", "_times")

    def __init__(self) -> None:
        self._left = self._times = 1

    def punted(self, view: View) -> bool:
        """One more came through user space; whether to pair anew."""
        if view.punt not in UNSETTLED:
            return False
        self._left -= 1
        if self._left:
            return False
        self._times *= UNSETTLED_TIMES
        self._left = self._times
        return True
