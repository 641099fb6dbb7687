"""What the store holds of certificates, revocations, tokens and nodes' allowances whose time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec

from controller import revocation, tokens
from controller.ca import Leaf
from controller.revocation import Revocation
from controller.store import Delete, Entry, Op, Store

TOKEN_KEPT_S = 86400.0  # after its end, so that a late use is called expired and not unknown


async def over(store: Store, revoked: Mapping[str, Revocation], now: float) -> tuple[list[Op], list[str]]:
    """The deletions, and the serials among them that were revoked. ``now``: unix seconds."""
    _, certificates = await store.list("serial/")
    _, handed_out = await store.list("token/")
    ops = await asyncio.to_thread(_past, certificates, handed_out, now)  # of a big mesh hundreds of thousands
    serials = [serial for serial, item in revoked.items() if item.until < now]
    ops += [Delete(f"revoked/{serial}") for serial in serials]
    _, owed = await store.list("allowance/")
    ops += [Delete(entry.key) for entry in owed if msgspec.json.decode(entry.value, type=float) < now]
    return ops, serials


def _past(certificates: Iterable[Entry], handed_out: Iterable[Entry], now: float) -> list[Op]:
    ops: list[Op] = []
    for entry in certificates:
        if msgspec.json.decode(entry.value, type=Leaf).not_after + revocation.SKEW_S < now:
            ops.append(Delete(entry.key))
    for entry in handed_out:
        if msgspec.json.decode(entry.value, type=tokens.Record).expires + TOKEN_KEPT_S < now:
            ops.append(Delete(entry.key))
    return ops
