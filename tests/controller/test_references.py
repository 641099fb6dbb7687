"""Who may run what, by the grants of all nodes."""

from __future__ import annotations

import pytest

from controller.references import Granted

GRANTED = Granted([("n1", "shop/web"), ("n1", "jobs/*"), ("n2", "shop/pay")])


@pytest.mark.parametrize(
    ("node", "namespace", "account", "may"),
    [
        ("n1", "shop", "web", True),
        ("n1", "jobs", "any", True),
        ("n1", "shop", "db", False),
        ("n1", "shop", "pay", False),
        ("n2", "shop", "web", False),
        ("n2", "jobs", "any", False),
        ("n3", "shop", "web", False),
    ],
)
def test_a_grant_is_of_one_node(node: str, namespace: str, account: str, may: bool) -> None:
    assert GRANTED(node, namespace, account) is may


def test_without_a_grant_nothing_may_run() -> None:
    assert not Granted([])("n1", "shop", "web") and Granted([]).nodes() == set()
    assert GRANTED.nodes() == {"n1", "n2"}
