from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.errors import SettingsError
from aios_edge.histogram import BUCKETS, BUCKETS_PER_DECADE, LOWEST_S, RELATIVE_ERROR, bucket_of, upper_bound_s
from aios_edge.telemetry import Event, Histogram, Status, Telemetry, rfc3339
from aios_edge.topics import Topics

durations = st.lists(st.floats(min_value=0, max_value=5000, allow_nan=False), max_size=60)


@given(durations, durations)
def test_merging_two_histograms_is_the_histogram_of_both(a: list[float], b: list[float]) -> None:
    merged, whole = Histogram.of(a).merge(Histogram.of(b)), Histogram.of(a + b)
    assert merged.counts == whole.counts
    assert (merged.count, merged.min_s, merged.max_s) == (whole.count, whole.min_s, whole.max_s)
    assert merged.range_reason == whole.range_reason and (merged.range_reason is None) == bool(merged.count)
    assert merged.sum_s == pytest.approx(whole.sum_s)


@given(
    st.lists(st.floats(min_value=LOWEST_S, max_value=999), min_size=1, max_size=80), st.sampled_from([0.5, 0.95, 0.99])
)
def test_a_quantile_is_within_the_stated_error_of_the_nearest_rank(values: list[float], q: float) -> None:
    true = sorted(values)[math.ceil(q * len(values)) - 1]
    estimate = Histogram.of(values).quantile(q)
    assert estimate is not None
    assert abs(estimate / true - 1) <= RELATIVE_ERROR + 1e-9


@given(st.floats(min_value=0, max_value=1e6))
def test_every_duration_has_a_bucket_whose_bounds_hold_it(value: float) -> None:
    index = bucket_of(value)
    assert 0 <= index <= BUCKETS + 1
    assert value <= upper_bound_s(index) * (1 + 1e-9)
    assert index == 0 or value >= upper_bound_s(index - 1) * (1 - 1e-9)


def test_a_whole_decade_begins_a_bucket() -> None:
    for decade in range(-5, 4):
        first = (decade + 5) * BUCKETS_PER_DECADE + 1
        assert bucket_of(10.0**decade) == first and bucket_of(math.nextafter(10.0**decade, 0.0)) == first - 1


@given(durations)
def test_a_histogram_survives_json(values: list[float]) -> None:
    histogram = Histogram.of(values)
    assert msgspec.json.decode(msgspec.json.encode(histogram), type=Histogram) == histogram


def test_an_empty_histogram_has_no_quantile_and_nonsense_is_refused() -> None:
    assert Histogram().quantile(0.5) is None
    for nonsense in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="not a duration"):
            Histogram.of([nonsense])
    with pytest.raises(ValueError, match="different buckets"):
        Histogram().merge(Histogram(buckets_per_decade=10))


def test_messages_carry_schema_and_time_and_null_for_what_was_not_measured() -> None:
    told = json.loads(msgspec.json.encode(Telemetry(ts=rfc3339(0.5), boot_id="b", seq=1, window_s=1.0)))
    assert told["schema"] == "1.0" and told["ts"] == "1970-01-01T00:00:00.500Z"
    assert told["power"]["total_w"] is None and told["latency"]["p95_s"] is None
    event = json.loads(msgspec.json.encode(Event(ts=rfc3339(0), boot_id="b", kind="activated", detail={"model": "m"})))
    assert event["schema"] == "1.0" and event["detail"] == {"model": "m"}


def test_a_reader_of_this_minor_reads_messages_with_more_fields() -> None:
    text = b'{"schema":"1.9","ts":"x","status":"online","why":"","group":"g","device":"d","boot_id":"b",'
    assert msgspec.json.decode(text + b'"agent_version":"9","profile":"p","later":[1]}', type=Status).status == "online"


def test_topics_stand_under_the_promised_root() -> None:
    topics = Topics("plant", "cam-1")
    assert (topics.status, topics.telemetry, topics.event) == tuple(
        f"aios/v1/plant/cam-1/{name}" for name in ("status", "telemetry", "event")
    )


@pytest.mark.parametrize("bad", ["", "  ", "a/b", "a+", "#", "nul\0", "x" * 200])
def test_a_name_that_cannot_be_a_topic_level_is_refused_by_its_key(bad: str) -> None:
    with pytest.raises(SettingsError, match=r"device\.id"):
        Topics("plant", bad)
    with pytest.raises(SettingsError, match=r"device\.group"):
        Topics(bad, "cam-1")
