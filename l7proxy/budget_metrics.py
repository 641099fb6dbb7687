"""Accounts as Prometheus families: what `pillion top` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from l7proxy.budget import Budgets


class BudgetCollector(Collector):  # type: ignore[misc]  # prometheus_client is not followed
    """``label``: an identity's, from a closed set."""

    def __init__(self, budgets: Budgets, label: Callable[[str], str]) -> None:
        self._budgets, self._label = budgets, label

    def describe(self) -> list[Metric]:
        return []  # names are not checked beforehand

    def collect(self) -> Iterable[Metric]:
        used = GaugeMetricFamily("pillion_budget_used", "What an identity takes now", labels=["identity", "what"])
        limit = GaugeMetricFamily("pillion_budget_max", "What it may take of a worker", labels=["identity", "what"])
        asked = CounterMetricFamily("pillion_budget_asked", "Requests and TLS handshakes", labels=["identity", "what"])
        seconds = CounterMetricFamily("pillion_budget_seconds", "Of the worker's time", labels=["identity"])
        refused = CounterMetricFamily("pillion_budget_refused", "Refusals over a budget", labels=["identity", "reason"])
        for account in list(self._budgets.accounts.values()):
            label, budget = self._label(account.spiffe), account.budget
            now = {
                "connections": account.connections,
                "streams": self._budgets.streams_of(account.spiffe),
                "bytes_in_flight": account.held,
                "descriptors": account.descriptors,
            }
            for what, value in now.items():
                used.add_metric([label, what], value)
                limit.add_metric([label, what], getattr(budget, what))
            for what in ("requests_per_s", "handshakes_per_s", "worker_share"):
                limit.add_metric([label, what], getattr(budget, what))
            asked.add_metric([label, "requests"], account.requests)
            asked.add_metric([label, "handshakes"], account.handshakes)
            seconds.add_metric([label], account.spent)
            for reason, count in account.refused.items():
                refused.add_metric([label, reason], count)
        yield from (used, limit, asked, seconds, refused)
