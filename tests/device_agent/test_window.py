from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aios_edge.telemetry import OutboxFigures, Telemetry
from device_agent.power.reading import PowerReading, Rail, Zone
from device_agent.values import Completion
from device_agent.window import Gauges, TelemetryWindow


def done(route: str = "local", *, status: int = 200, latency_s: float = 0.01, **more: object) -> Completion:
    return Completion(model="m", route=route, reason="idle", status=status, latency_s=latency_s, **more)  # type: ignore[arg-type]


def watts(at_s: float, total_w: float | None, **more: object) -> PowerReading:
    known: dict[str, object] = {"total_method": "measured", "total_source": "VDD_IN", "reason": None} | more
    if total_w is None:
        known |= {"total_method": "unknown", "total_source": None, "reason": "sensor gone"}
    return PowerReading(at_s=at_s, total_w=total_w, **known)  # type: ignore[arg-type]


def close(window: TelemetryWindow, now: float, gauges: Gauges | None = None) -> Telemetry:
    gauges = gauges or Gauges()
    return window.close(now, ts="t", boot_id="b", seq=1, gauges=gauges, outbox=OutboxFigures(depth=3))


def test_joules_per_inference_gross_and_above_idle() -> None:
    window = TelemetryWindow(0.0)
    for second in range(1, 11):
        window.add(watts(float(second), 6.0, idle_w=2.0, idle_method="lowest_seen", active_w=4.0))
    for _ in range(20):
        window.add(done())
    window.add(done("cloud"))
    told = close(window, 10.0)
    assert told.requests.batch_sizes == {}
    assert told.power.total_w == pytest.approx(6.0) and told.power.total_method == "measured"
    assert told.energy.energy_j == pytest.approx(60.0)
    assert told.energy.j_per_inference_gross == pytest.approx(3.0)  # 20 local ones; the cloud's costs us nothing
    assert told.energy.j_per_inference_active == pytest.approx(2.0)
    assert told.energy.method == "measured"


def test_what_ran_here_took_energy_also_where_the_cloud_gave_the_better_answer() -> None:
    window = TelemetryWindow(0.0)
    window.add(watts(10.0, 6.0))
    for _ in range(10):
        window.add(done())
        window.add(done("cloud", batch_size=2, queue_s=0.001))
    told = close(window, 10.0)
    assert told.energy.j_per_inference_gross == pytest.approx(3.0)
    assert told.requests.batch_sizes == {"2": 10} and told.requests.routes == {"cloud": 10, "local": 10}


def test_power_is_weighted_by_the_time_each_reading_stands_for() -> None:
    window = TelemetryWindow(0.0)
    window.add(watts(1.0, 10.0))
    window.add(watts(10.0, 2.0))
    assert close(window, 10.0).power.total_w == pytest.approx((10 * 1 + 2 * 9) / 10)


def test_what_was_not_measured_is_null_with_a_reason() -> None:
    window = TelemetryWindow(0.0)
    told = close(window, 1.0)
    for value, reason in (
        (told.power.total_w, told.power.total_reason),
        (told.energy.energy_j, told.energy.energy_reason),
        (told.energy.j_per_inference_gross, told.energy.j_per_inference_reason),
        (told.latency.p95_s, told.latency.latency_reason),
        (told.latency.histogram.min_s, told.latency.histogram.range_reason),
        (told.latency.histogram.max_s, told.latency.histogram.range_reason),
        (told.thermal or None, told.thermal_reason),
        (told.queue.depth, told.queue.depth_reason),
        (told.queue.wait_p95_s, told.queue.wait_reason),
        (told.throttled, told.throttled_reason),
        (told.cpu_utilisation, told.cpu_utilisation_reason),
        (told.memory.agent_rss_bytes, told.memory.memory_reason),
    ):
        assert value is None and reason
    window.add(watts(1.5, None, thermal_reason="no zone here"))
    told = close(window, 2.0)
    assert told.energy.energy_reason == "sensor gone" and told.thermal_reason == "no zone here"
    window.add(watts(2.5, 5.0))
    assert close(window, 3.0).energy.j_per_inference_reason == "no local inference in this window"


def test_readings_of_different_sources_are_not_averaged() -> None:
    window = TelemetryWindow(0.0)
    window.add(watts(1.0, 50.0, total_method="estimated", total_source="model"))
    window.add(watts(2.0, 5.0))
    told = close(window, 2.0)
    assert (told.power.total_w, told.power.total_method, told.power.samples) == (5.0, "measured", 1)


def test_only_answers_count_as_latency_and_throughput() -> None:
    window = TelemetryWindow(0.0)
    for completion in (
        done(latency_s=0.1, late=False, batch_size=2, queue_s=0.02),
        done(latency_s=0.1, late=True, batch_size=2, queue_s=0.02),
        done("cloud", latency_s=0.3, late=False),
        done("shed", status=503, latency_s=0.0001, late=True),
        done("error", status=500, latency_s=9.0),
    ):
        window.add(completion)
    told = close(window, 2.0)
    assert told.requests.offered == 5 and told.requests.answered == 3
    assert told.requests.throughput_per_s == 1.5
    assert (told.requests.with_deadline, told.requests.late) == (4, 2)
    assert told.requests.routes == {"cloud": 1, "error": 1, "local": 2, "shed": 1}
    assert told.requests.batch_sizes == {"2": 2}
    assert told.latency.histogram.count == 3
    assert told.latency.p50_s == pytest.approx(0.1, rel=0.06) and told.latency.p99_s == pytest.approx(0.3, rel=0.06)
    assert told.queue.wait_p95_s == pytest.approx(0.02, rel=0.06)


def test_gauges_thermal_and_throttling_are_told() -> None:
    window = TelemetryWindow(0.0)
    window.add(watts(1.0, 5.0, throttled=True, rails=(Rail(name="VDD_IN", power_w=5.0, source="x"),)))
    window.add(watts(2.0, 5.0, throttled=False, thermal=(Zone(name="cpu", temperature_c=60.0),), cpu_utilisation=0.5))
    gauges = Gauges(
        queue_depth=4, waiting_limits={"m": 9}, breakers={"c": "open"}, agent_rss_bytes=1, workers_rss_bytes={"m": 2}
    )
    told = close(window, 2.0, gauges)
    assert told.throttled is True  # at some moment of the window
    assert told.thermal[0].temperature_c == 60.0 and told.thermal_reason is None and told.cpu_utilisation == 0.5
    assert told.queue.waiting_limits == {"m": 9}
    assert told.queue.depth == 4 and told.breakers == {"c": "open"} and told.memory.workers_rss_bytes == {"m": 2}
    assert told.power.rails_w == {"VDD_IN": 5.0} and told.outbox.depth == 3


@given(st.lists(st.tuples(st.sampled_from(["local", "cloud", "shed", "error"]), st.floats(0, 100)), max_size=50))
def test_nothing_is_lost_or_counted_twice_between_windows(items: list[tuple[str, float]]) -> None:
    window = TelemetryWindow(0.0)
    half = len(items) // 2
    told = []
    for part, now in ((items[:half], 1.0), (items[half:], 2.0)):
        for route, latency_s in part:
            window.add(done(route, status=200 if route in ("local", "cloud") else 503, latency_s=latency_s))
        told.append(close(window, now))
    assert sum(message.requests.offered for message in told) == len(items)
    answered = sum(route in ("local", "cloud") for route, _ in items)
    assert told[0].latency.histogram.merge(told[1].latency.histogram).count == answered
    assert close(window, 3.0).requests.offered == 0
