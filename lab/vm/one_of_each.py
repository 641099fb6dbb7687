"""A pytest plugin: of each test one variant alone, the first that is chosen. For a machine too slow for all of them."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    left_out = [item for item in items if first[item.nodeid.partition("[")[0]] is not item]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
