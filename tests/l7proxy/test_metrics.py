"""The histogram of `Series`: the short way, for a duration near the last one, counts where looking it up would."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.metrics import Series
from mesh.metrics import BOUNDS_S


@settings(deadline=None)
@given(st.lists(st.sampled_from((0.0, -1e-9, *BOUNDS_S)) | st.floats(-0.001, 11.0)))
def test_every_duration_falls_into_its_bucket(durations: list[float]) -> None:
    series = Series("a", "b", "local")
    expected = [0] * (len(BOUNDS_S) + 1)
    for seconds in durations:
        series.done(200, seconds)
        expected[bisect_left(BOUNDS_S, seconds)] += 1
    assert series.buckets == expected
