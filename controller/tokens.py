"""Join tokens: what an operator hands to a new node. At most ten minutes, once, for one node and its grant.

Only a hash of the secret is stored. The first use binds the token to the key of the certificate request, in the
transaction that issues the node's certificate, so two racing uses cannot both win.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from dataclasses import dataclass

import msgspec

TTL_S_MAX = 600.0
SECRET_BYTES = 32
OUTSTANDING_MAX = 10_000


class Record(msgspec.Struct, frozen=True):
    """Under ``token/<sha256 of the secret>``."""

    node: str
    grant: int  # revision at which the node's grant was made, 0: there was none
    expires: float  # unix seconds
    used_key: str = ""  # fingerprint of the key it was used with
    readmit: bool = False  # an operator meant it for a node that is cut


@dataclass(frozen=True)
class Refusal:
    reason: str
    message: str


def digest(secret: str) -> str:
    """The stored form. The secret has 256 random bits: a slow hash would add nothing."""
    return hashlib.sha256(secret.encode()).hexdigest()


def issue(node: str, grant: int, ttl_s: float, now: float | None = None, *, readmit: bool = False) -> tuple[str, Record]:
    """A new secret and what to store of it. ``ttl_s`` is in (0, 600]; ValueError otherwise."""
    if not 0 < ttl_s <= TTL_S_MAX:
        raise ValueError(f"ttl_s must be over 0 and at most {TTL_S_MAX:g}, not {ttl_s:g}")
    secret = secrets.token_urlsafe(SECRET_BYTES)
    return secret, Record(node, grant, (time.time() if now is None else now) + ttl_s, readmit=readmit)


def judge(record: Record | None, node: str, grant: int, key: str, now: float) -> Refusal | None:
    """Whether ``node`` with the key ``key`` may use the token now. None: it may. Order: nothing is told to a stranger."""
    again = "ask an operator for a new one: pillion node token " + node
    if record is None:
        return Refusal("token_unknown", f"this controller issued no such token; {again}")
    if record.node != node:
        return Refusal("token_wrong_node", f"the token is for another node, not {node!r}; {again}")
    if record.used_key:
        if record.used_key != key:
            return Refusal(
                "token_other_key", f"the token was used with another key; if that was not you, cut the node, then {again}"
            )
        return Refusal("token_used", f"the token was used already; {again}")
    if now >= record.expires:
        return Refusal("token_expired", f"the token has expired; {again}")
    if record.grant and record.grant != grant:
        return Refusal("token_grant_changed", f"the grant the token was issued under is gone; {again}")
    return None


def encode(controllers: list[str], ca: str, node: str, secret: str) -> str:
    """The one string an operator copies: base64url of JSON ``{controller, ca, node, secret}``."""
    text = msgspec.json.encode({"controller": controllers, "ca": ca, "node": node, "secret": secret})
    return base64.urlsafe_b64encode(text).decode()
