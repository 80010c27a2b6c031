"""Metrics are read from plain numbers when somebody scrapes, and keep the rules of their names and bounds."""

from functools import partial

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.metrics import Family, Histogram, Metrics, MetricType, Sample

READS = Family("steadyread_reads_total", "Reads.", MetricType.COUNTER, ("node",))
OPEN = Family("steadyread_client_connections", "Clients connected.", MetricType.GAUGE)
TIME = Family("steadyread_read_duration_seconds", "Time to answer.", MetricType.HISTOGRAM)


def only(sample: Sample) -> list[Sample]:
    """A source of one sample."""
    return [sample]


def scraped(metrics: Metrics) -> dict[str, float]:
    """Each of our samples as its text form -> value, read by prometheus-client's own parser."""
    text = generate_latest(metrics.registry).decode()
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("steadyread_")
    }


def test_a_scrape_reads_the_numbers_as_they_are_then() -> None:
    class Counts:
        reads = 0

    counts, metrics = Counts(), Metrics()
    metrics.register_source(lambda: [Sample(READS, counts.reads, ("n1",)), Sample(OPEN, 2)])
    assert scraped(metrics) == {"steadyread_reads_total{node=n1}": 0, "steadyread_client_connections": 2}
    counts.reads += 7
    assert scraped(metrics)["steadyread_reads_total{node=n1}"] == 7


def test_alike_samples_of_several_sources_are_added_and_leave_with_their_source() -> None:
    metrics = Metrics()
    metrics.register_source(lambda: [Sample(OPEN, 2)])
    end = metrics.register_source(lambda: [Sample(OPEN, 3)])
    assert scraped(metrics)["steadyread_client_connections"] == 5
    end()
    assert scraped(metrics)["steadyread_client_connections"] == 2


def test_a_histogram_counts_cumulatively_with_inclusive_bounds() -> None:
    metrics = Metrics()
    for values in ([0.1, 0.2], [0.5, 3.0]):
        histogram = Histogram((0.1, 0.5))
        for value in values:
            histogram.observe(value)
        sample = Sample(TIME, histogram)
        metrics.register_source(partial(only, sample))
    assert scraped(metrics) == pytest.approx(
        {
            "steadyread_read_duration_seconds_bucket{le=0.1}": 1,
            "steadyread_read_duration_seconds_bucket{le=0.5}": 3,
            "steadyread_read_duration_seconds_bucket{le=+Inf}": 4,
            "steadyread_read_duration_seconds_count": 4,
            "steadyread_read_duration_seconds_sum": 3.8,
        }
    )


def test_series_are_bounded_and_what_is_left_out_is_counted() -> None:
    """Promise 7: memory is bounded by settings, whatever clients send."""
    family = Family("steadyread_x_total", "X.", MetricType.COUNTER, ("key",), series_max=2)
    metrics = Metrics()
    metrics.register_source(lambda: [Sample(family, 1, (str(number % 5),)) for number in range(10)])
    assert scraped(metrics) == {
        "steadyread_x_total{key=0}": 2,
        "steadyread_x_total{key=1}": 2,
        "steadyread_metric_series_dropped{family=steadyread_x_total}": 3,
    }


@pytest.mark.parametrize(
    ("name", "type_", "labels", "message"),
    [
        ("reads_total", MetricType.COUNTER, (), "is named steadyread_"),
        ("steadyread_Reads_total", MetricType.COUNTER, (), "is named steadyread_"),
        ("steadyread_reads", MetricType.COUNTER, (), "only counters, end in _total"),
        ("steadyread_open_total", MetricType.GAUGE, (), "only counters, end in _total"),
        ("steadyread_lag_ms", MetricType.GAUGE, (), "give base units"),
        ("steadyread_lag_seconds", MetricType.GAUGE, ("Node",), "labels are words in lower case"),
        ("steadyread_lag_seconds", MetricType.HISTOGRAM, ("le",), "and not le"),
    ],
)
def test_a_declaration_against_the_rules_fails_where_it_stands(
    name: str, type_: MetricType, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Family(name, "Help.", type_, labels)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample(READS, 1)], "has the labels"),
        ([Sample(TIME, 1.0)], "is a histogram"),
        ([Sample(OPEN, Histogram((1.0,)))], "is a gauge"),
        ([Sample(OPEN, 1), Sample(Family(OPEN.name, "Other.", MetricType.GAUGE), 1)], "declared in two ways"),
        ([Sample(TIME, Histogram((1.0,))), Sample(TIME, Histogram((2.0,)))], "different bounds"),
    ],
)
def test_a_sample_against_its_declaration_fails_the_scrape(samples: list[Sample], message: str) -> None:
    metrics = Metrics()
    metrics.register_source(lambda: samples)
    with pytest.raises(ValueError, match=message):
        generate_latest(metrics.registry)
