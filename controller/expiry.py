"""What the store holds of certificates, revocations and tokens whose time is over."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from controller import revocation, tokens
from controller.ca import Leaf
from controller.revocation import Revocation
from controller.store import Delete, Op, Store

TOKEN_KEPT_S = 86400.0  # after its end, so that a late use is called expired and not unknown


async def over(store: Store, revoked: Mapping[str, Revocation], now: float) -> tuple[list[Op], list[str]]:
    """The deletions, and the serials among them that were revoked. ``now``: unix seconds."""
    _, entries = await store.list("serial/")
    ops: list[Op] = [
        Delete(e.key) for e in entries if msgspec.json.decode(e.value, type=Leaf).not_after + revocation.SKEW_S < now
    ]
    _, entries = await store.list("token/")
    ops += [Delete(e.key) for e in entries if msgspec.json.decode(e.value, type=tokens.Record).expires + TOKEN_KEPT_S < now]
    serials = [serial for serial, item in revoked.items() if item.until < now]
    ops += [Delete(f"revoked/{serial}") for serial in serials]
    return ops, serials
