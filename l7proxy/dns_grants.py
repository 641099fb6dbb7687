"""What an answer for a name outside the mesh opens: its addresses, read from what the client will read, and the question to
the agent that opens them. The client has its answer when they are open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from mesh.link import Grant, Granted, Message
from mesh.outside import GRANT_ADDRESSES_MAX, GRANT_GRACE_S, GRANT_S_MAX

if TYPE_CHECKING:
    from l7proxy.worker import Worker

CHAIN_MAX = 16  # CNAMEs
ANSWER_TTL_S_MAX = int(GRANT_S_MAX - GRANT_GRACE_S)  # who keeps a name longer would find its address closed
WAIT_S = 1.0  # for the agent; the answer goes out in any case, and the kernel says what is open
WAITING_MAX = 4096


@dataclass(frozen=True, slots=True)
class Answered:
    """``wire``: the answer as the client may have it: no more addresses, and no longer, than are opened."""

    addresses: tuple[str, ...]
    ttl_s: int
    wire: bytes


def answered(wire: bytes) -> Answered | None:
    """The addresses that the question's own name leads to, by way of its CNAMEs: what else an answer holds opens nothing.
    None: no addresses were asked for, or none answered."""
    try:
        message = dns.message.from_wire(wire)
        question = message.question[0]
        if question.rdclass != dns.rdataclass.IN or question.rdtype not in (dns.rdatatype.A, dns.rdatatype.AAAA):
            return None
        chain, last = _chain(message, question.name, question.rdtype)
        if last is None:
            return None
        kept = list(last)[:GRANT_ADDRESSES_MAX]
        ttl = min(rrset.ttl for rrset in (*chain, last))
        message.answer = [*chain, dns.rrset.from_rdata_list(last.name, last.ttl, kept)]
        for rrset in message.answer:
            rrset.ttl = min(rrset.ttl, ANSWER_TTL_S_MAX)
        out = message.to_wire(max_size=len(wire) + 512)
        return Answered(tuple(rdata.address for rdata in kept), ttl, out if len(out) <= len(wire) else wire)
    except (dns.exception.DNSException, ValueError, IndexError):
        return None


def _chain(
    message: dns.message.Message, name: dns.name.Name, rdtype: dns.rdatatype.RdataType
) -> tuple[list[dns.rrset.RRset], dns.rrset.RRset | None]:
    """The CNAMEs from a name on, and the records at their end."""
    by_name = {(rrset.name, rrset.rdtype): rrset for rrset in message.answer if rrset.rdclass == dns.rdataclass.IN}
    chain: list[dns.rrset.RRset] = []
    for _ in range(CHAIN_MAX):
        if (found := by_name.get((name, rdtype))) is not None:
            return chain, found
        alias = by_name.get((name, dns.rdatatype.CNAME))
        if alias is None:
            break
        chain.append(alias)
        name = alias[0].target
    return chain, None


class Asking:
    """Questions to the agent that are under way."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._number = 0
        self._waiting: dict[int, Callable[[str], None]] = {}

    def ask(
        self, netns: int, client: tuple[str, int], transport: str, name: str, found: Answered, then: Callable[[str], None]
    ) -> None:
        """``then`` gets the reason of a refusal, or ""."""
        self._number += 1
        number = self._number
        grant = Grant(number, netns, client, transport, name, found.addresses, float(found.ttl_s))
        if len(self._waiting) >= WAITING_MAX or not self._worker.send(grant):
            then("no_agent")
            return
        self._waiting[number] = then
        self._worker.loop.call_later(WAIT_S, self._answer, number, "late")

    def hear(self, message: Message) -> bool:
        """Whether it was about a grant."""
        if not isinstance(message, Granted):
            return False
        self._answer(message.number, message.reason)
        return True

    def _answer(self, number: int, reason: str) -> None:
        then = self._waiting.pop(number, None)
        if then is not None:
            then(reason)
