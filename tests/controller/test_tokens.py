"""Join tokens, as a pure judgement."""

from __future__ import annotations

import base64
import json

import msgspec
import pytest

from controller import tokens
from controller.tokens import Record, judge

GOOD = Record("n1", 7, 1000.0)


def reason(record: Record | None, node: str = "n1", grant: int = 7, key: str = "k", now: float = 999.0) -> str:
    refusal = judge(record, node, grant, key, now)
    return refusal.reason if refusal else ""


def test_judgements() -> None:
    assert reason(GOOD) == ""
    assert reason(None) == "token_unknown"
    assert reason(GOOD, node="n2") == "token_wrong_node"
    assert reason(GOOD, now=1000.0) == "token_expired"
    assert reason(GOOD, grant=8) == "token_grant_changed"
    assert reason(GOOD, grant=0) == "token_grant_changed"
    used = msgspec.structs.replace(GOOD, used_key="k")
    assert reason(used) == "token_used"
    assert reason(used, key="other") == "token_other_key"


def test_a_token_without_a_grant_may_get_one_before_it_is_used() -> None:
    assert reason(msgspec.structs.replace(GOOD, grant=0), grant=9) == ""


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 600.1, float("nan"), float("inf")])
def test_the_life_of_a_token_is_bounded(ttl_s: float) -> None:
    with pytest.raises(ValueError, match="600"):
        tokens.issue("n1", 0, ttl_s)


def test_what_is_stored_does_not_hold_the_secret() -> None:
    secret, record = tokens.issue("n1", 7, 600.0, now=400.0)
    assert record == GOOD and len(secret) >= 43
    assert secret not in tokens.digest(secret) and tokens.digest(secret) != tokens.digest(secret + "x")
    text = tokens.encode(["https://a:1"], "PEM", "n1", secret)
    assert json.loads(base64.urlsafe_b64decode(text)) == {
        "controller": ["https://a:1"],
        "ca": "PEM",
        "node": "n1",
        "secret": secret,
    }
