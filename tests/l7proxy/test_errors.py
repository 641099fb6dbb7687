from __future__ import annotations

import pytest

from l7proxy.errors import DETAIL_CHARS_MAX, REASONS, denied, plain, reply


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_reason_has_a_status_and_one_line_of_advice(reason: str) -> None:
    raw = reply(reason).encode(close=False)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % REASONS[reason][0])
    assert b"\r\nx-pillion-reason: " + reason.encode() in head and b"\r\nserver: pillion" in head
    assert b"content-length: %d" % len(body) in head
    assert body.endswith((b".\n", b"?\n")) and body.count(b"\n") == 1
    assert b"connection: close" in reply(reason).encode(close=True)
    assert reply(reason).encode(close=False, head_only=True).endswith(b"\r\n\r\n")


def test_the_rule_is_named_and_nothing_is_injected() -> None:
    body = denied("shop/x\r\nSet-Cookie: a\x1b[2J#0").encode(close=False).partition(b"\r\n\r\n")[2]
    assert body.startswith(rb"RBAC: denied by shop/x\x0d\x0aSet-Cookie: a\x1b[2J#0.")
    assert len(plain("a" * 10_000)) == DETAIL_CHARS_MAX
