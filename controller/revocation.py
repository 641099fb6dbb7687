"""Certificates that are taken back before their end: which they are, and how that is stored."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass

import msgspec

from controller.ca import Leaf, serial_text
from controller.events import Refused
from controller.references import Granted
from controller.store import Op, Put, Store
from mesh.identity import SpiffeId, parse

SERIAL_CHARS_MAX = 64
SKEW_S = 3600.0  # a revocation outlives its certificate by this, for clocks that run behind


class Revocation(msgspec.Struct, frozen=True):
    """Under ``revoked/<serial>``; ``until``: unix seconds after which nobody would accept the certificate anyway."""

    node: str
    until: float


async def live(
    store: Store, role: str, name: str, revoked: Container[str], chosen: Callable[[Leaf], bool] = lambda _: True
) -> dict[str, Revocation]:
    """An owner's certificates that are neither expired nor revoked yet, as revocations by serial."""
    prefix, now = f"serial/{role}:{name}/", time.time()
    _, entries = await store.list(prefix)
    found: dict[str, Revocation] = {}
    for entry in entries:
        leaf, serial = msgspec.json.decode(entry.value, type=Leaf), entry.key.removeprefix(prefix)
        if leaf.not_after > now and serial not in revoked and chosen(leaf):
            found[serial] = Revocation(name, leaf.not_after + SKEW_S)
    return found


@dataclass(frozen=True)
class Certificate:
    """One that was issued and is remembered still. ``owner``: ``node:<name>``, ``operator:<name>`` or ``controller``."""

    owner: str
    serial: str
    leaf: Leaf


async def issued(store: Store, prefix: str = "") -> list[Certificate]:
    """The certificates of owners whose name starts with ``prefix``."""
    _, entries = await store.list(f"serial/{prefix}")
    parts = ((entry.key.removeprefix("serial/").rpartition("/"), entry.value) for entry in entries)
    return [Certificate(owner, serial, msgspec.json.decode(value, type=Leaf)) for (owner, _, serial), value in parts]


async def by_serial(store: Store, text: str) -> Certificate:
    """The certificate with a serial, as any tool prints it. Refused: 400 if it is none, 404 if we have not issued it."""
    digits = text.replace(":", "")
    if not 0 < len(digits) <= SERIAL_CHARS_MAX or set(digits.lower()) - set("0123456789abcdef"):
        raise Refused("bad_request", f"{text[:80]!r} is no serial; `pillion identity show NAME` prints it", 400)
    serial = serial_text(digits)
    for certificate in await issued(store):
        if certificate.serial == serial:
            return certificate
    raise Refused("not_found", f"this controller issued no certificate {serial} that could still be used", 404)


Find = Callable[[Store, Container[str]], Awaitable[dict[str, Revocation]]]


def one(certificate: Certificate) -> Find:
    """Picks one certificate, unless it is revoked; Refused with 409 if it is the controller's own."""

    async def find(store: Store, revoked: Container[str]) -> dict[str, Revocation]:
        del store
        role, _, name = certificate.owner.partition(":")
        if role not in ("node", "operator"):
            raise Refused("controllers_own", "this certificate is the controller's own; restart it, and it has another", 409)
        until = certificate.leaf.not_after + SKEW_S
        return {} if certificate.serial in revoked else {certificate.serial: Revocation(name, until)}

    return find


def of_operator(name: str) -> Find:
    """Picks every live certificate of an operator; Refused with 404 if there is none."""

    async def find(store: Store, revoked: Container[str]) -> dict[str, Revocation]:
        found = await live(store, "operator", name, revoked)
        if not found:
            raise Refused("not_found", f"operator {name} has no live certificate; `pillion operator list` shows who has", 404)
        return found

    return find


def outside(node: str, grants: Granted) -> Callable[[Leaf], bool]:
    """Picks workloads' certificates that ``node`` is not granted."""

    def of(leaf: Leaf) -> bool:
        who = parse(leaf.spiffe)
        return isinstance(who, SpiffeId) and not grants(node, who.namespace, who.service_account)

    return of


def writes(revoked: Mapping[str, Revocation]) -> list[Op]:
    """What to store."""
    return [Put(f"revoked/{serial}", msgspec.json.encode(revocation)) for serial, revocation in revoked.items()]
