from __future__ import annotations

import pytest

from mesh.budgets import BudgetTable
from mesh.compile import Allocations, compile_state, reachable
from mesh.model import CONFIG_KEY, Budget, BudgetChange, Config, IdentityBudget
from mesh.resources import ResourceErrors, load

WEB, DB, OTHER = (f"spiffe://mesh.local/ns/{name}" for name in ("shop/sa/web", "shop/sa/db", "other/sa/web"))

TEXT = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {budgets: {connections: 100, workerShare: 0.25}, connectsUnderWay: 300}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: IdentityBudget
metadata: {name: batch, namespace: shop}
spec:
  principals: ["mesh.local/ns/shop/sa/batch"]
  budgets: {requestsPerSecond: 200}
"""


def test_from_yaml_to_every_node() -> None:
    state = compile_state(load(TEXT), Allocations())
    config = state[CONFIG_KEY]
    assert isinstance(config, Config)
    assert config.budgets == Budget(connections=100, worker_share=0.25)
    assert config.connects_max == 300
    item = IdentityBudget("batch", "shop", BudgetChange(requests_per_s=200), ("mesh.local/ns/shop/sa/batch",))
    assert state["IdentityBudget/shop/batch"] == item
    assert reachable(state, "any")["IdentityBudget/shop/batch"] == item


@pytest.mark.parametrize(
    "budgets", ["{}", "{connections: 0}", "{workerShare: 1.5}", "{bytesInFlight: 1}", "{requests: 5}", "{streams: many}"]
)
def test_what_is_no_budget_is_refused(budgets: str) -> None:
    with pytest.raises(ResourceErrors):
        load(TEXT.replace("{requestsPerSecond: 200}", budgets))


def test_the_smallest_that_selects_an_identity_holds() -> None:
    default = Budget(connections=100, streams=50)
    table = BudgetTable(
        default,
        "root",
        [
            IdentityBudget("all", "shop", BudgetChange(connections=500, streams=40)),
            IdentityBudget("web", "shop", BudgetChange(connections=300), ("mesh.local/ns/shop/sa/web",)),
            IdentityBudget("foreign", "other", BudgetChange(connections=1), ("mesh.local/ns/shop/sa/*",)),
            IdentityBudget("mesh", "root", BudgetChange(handshakes_per_s=7), ("*/sa/web",)),
        ],
    )
    assert table.of(WEB) == Budget(connections=300, streams=40, handshakes_per_s=7)
    assert table.of(DB) == Budget(connections=500, streams=40)
    assert table.of(OTHER) == Budget(connections=100, streams=50, handshakes_per_s=7)  # a foreign namespace selects nobody
    assert table.of(None) == table.of("no identity") == default
