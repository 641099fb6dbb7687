"""What the kernel counted, under the proxy's names."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.metrics import BOUNDS_S
from nodeagent.express_path import Stat, bucket_floor_ns
from nodeagent.express_programs import Key, Program
from nodeagent.express_report import metrics_text, quantile_us, top

BUCKETS = 224
SOURCE, SERVER = "spiffe://mesh.local/ns/shop/sa/cart", "spiffe://mesh.local/ns/shop/sa/web"


def stat(*durations_ns: int) -> Stat:
    buckets = [0] * BUCKETS
    for duration in durations_ns:
        buckets[max(b for b in range(BUCKETS - 1) if bucket_floor_ns(b) <= duration)] += 1
    return Stat(len(durations_ns), 100 * len(durations_ns), 200 * len(durations_ns), sum(durations_ns), tuple(buckets))


def program() -> Program:
    return Program(3, Key(400, "Service/shop/web", 80), SOURCE, names=[("shop/a#0", SERVER), ("shop/b#0", SERVER)])


def test_buckets_are_good_to_a_tenth() -> None:
    for bucket in range(16, BUCKETS - 1):
        low, high = bucket_floor_ns(bucket), bucket_floor_ns(bucket + 1)
        assert 0 < high - low <= low / 8 + 128  # the middle is within 1/16 of all in it
    assert quantile_us([0] * BUCKETS, 0.5) == 0


@pytest.mark.parametrize("us", [20, 150, 999, 12_345, 2_000_000])
def test_a_quantile_finds_its_bucket(us: int) -> None:
    buckets = stat(*[us * 1000] * 99, 60_000_000_000).buckets
    assert quantile_us(buckets, 0.5) == pytest.approx(us, rel=0.1)


def test_requests_of_all_rules_are_one_series_as_the_proxys_are() -> None:
    stats = {(3, 0, 200): stat(100_000, 700_000), (3, 1, 200): stat(2_000_000), (3, 1, 404): stat(50_000), (9, 0, 200): stat(1)}
    text = metrics_text(
        [program()], stats, {"carried": 4, "sample": 1}, {"paired": 2}, 2, True, {"fionread": "ok", "epoll": "no"}
    )
    samples = {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    where = ("destination=shop/web", "path_kind=express", "source=shop/cart")
    assert samples["pillion_requests_total", "code=200", *where] == 3
    assert samples["pillion_requests_total", "code=404", *where] == 1
    assert samples["pillion_request_seconds_count", "destination=shop/web", "source=shop/cart"] == 4
    for bound in BOUNDS_S:
        wanted = sum(duration <= bound for duration in (0.0001, 0.0007, 0.002, 0.00005))
        assert samples["pillion_request_seconds_bucket", "destination=shop/web", f"le={bound!r}", "source=shop/cart"] == wanted
    assert samples["pillion_express_bytes_total", "destination=shop/web", "direction=out", "source=shop/cart"] == 800
    assert samples["pillion_express_total", "event=sample"] == 1
    assert samples["pillion_express_probe", "probe=epoll"] == 0 and samples[("pillion_express_on",)] == 1
    assert bisect_left(BOUNDS_S, 0.0007) == 1


def test_top_is_by_rule() -> None:
    rows = top([program()], {(3, 0, 200): stat(100_000), (3, 1, 200): stat(2_000_000, 2_000_000), (3, 1, 404): stat(50_000)})
    assert [(row["source"], row["service"], row["rule"], row["kernel"]) for row in rows] == [
        ("shop/cart", "shop/web", "shop/b#0", 3),
        ("shop/cart", "shop/web", "shop/a#0", 1),
    ]
