"""Metrics: plain numbers on the objects that do the work, read when somebody scrapes.

The hot path adds to an int and knows nothing of this module. Whoever owns such numbers registers a *source*:
a callable that yields them as samples of a declared ``Family``. A scrape calls all sources synchronously, so
each must be quick and must not wait.

Names begin with ``steadyread_``, units are base units (seconds, bytes), counters end in ``_total``. Labels
are bounded: each family keeps at most ``series_max`` series, and what is left out is itself counted.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "steadyread_"
SERIES_MAX = 1000  # per family unless it says otherwise: a few hundred nodes times a few kinds
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_SCALED_UNITS = (
    "milliseconds",
    "microseconds",
    "ms",
    "us",
    "minutes",
    "kilobytes",
    "megabytes",
    "kb",
    "mb",
    "percent",
)


class MetricType(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric's declaration. Raises ValueError, where it is declared, if it breaks the rules of names."""

    name: str  # with prefix and unit, a counter's with _total
    help: str
    type: MetricType
    labels: tuple[str, ...] = ()
    series_max: int = SERIES_MAX

    def __post_init__(self) -> None:
        words = self.name.split("_")
        if not self.name.startswith(PREFIX) or not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r}: a metric is named {PREFIX}words_in_lower_case")
        if (words[-1] == "total") != (self.type is MetricType.COUNTER):
            raise ValueError(f"{self.name!r}: counters, and only counters, end in _total")
        if not set(words).isdisjoint(_SCALED_UNITS):
            raise ValueError(f"{self.name!r}: give base units: seconds, bytes, ratio")
        if not all(_NAME.fullmatch(label) for label in self.labels) or "le" in self.labels:
            raise ValueError(f"{self.name!r}: labels are words in lower case, and not le: {self.labels}")
        if not self.help:
            raise ValueError(f"{self.name!r}: say what it counts")


class Histogram:
    """Observations in buckets: one bisection and two additions each. Not for use from several threads."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """``bounds``: ascending, the greatest value each bucket takes; one more bucket takes the rest."""
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"bounds must ascend: {bounds}")
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` observations of ``value``."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a family; ``label_values`` in the order of the family's labels."""

    family: Family
    value: float | Histogram
    label_values: tuple[str, ...] = ()


Source = Callable[[], Iterable[Sample]]

SERIES_DROPPED = Family(
    PREFIX + "metric_series_dropped",
    "Series left out of this scrape because their family has more than it may have.",
    MetricType.GAUGE,
    ("family",),
)


class Metrics:
    """The registry of one proxy, and the sources it is filled from."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_SourceCollector(self))
        ProcessCollector(registry=self.registry)
        self._sources: list[Source] = []

    def register_source(self, source: Source) -> Callable[[], None]:
        """Reads ``source`` at each scrape from now on. Returns what ends that; then its series are gone.

        Samples of the same family and labels are added up, also over several sources: so each of many
        alike objects may be a source of its own.
        """
        self._sources.append(source)
        return lambda: self._sources.remove(source)

    def samples(self) -> Iterator[Sample]:
        for source in tuple(self._sources):
            yield from source()


class _SourceCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Nothing in advance: families become known with their samples."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, sorted by name. Raises ValueError if a source breaks its family's declaration."""
        families: dict[str, Family] = {}
        values: dict[str, dict[tuple[str, ...], float | Histogram]] = {}  # name -> label values -> value
        dropped: dict[str, set[tuple[str, ...]]] = {}
        for sample in self._metrics.samples():
            family = families.setdefault(sample.family.name, sample.family)
            if family != sample.family:
                raise ValueError(f"{family.name} is declared in two ways")
            _check(sample)
            series = values.setdefault(family.name, {})
            if sample.label_values in series:
                series[sample.label_values] = _sum(family, series[sample.label_values], sample.value)
            elif len(series) < family.series_max:
                series[sample.label_values] = sample.value
            else:
                dropped.setdefault(family.name, set()).add(sample.label_values)
        families[SERIES_DROPPED.name] = SERIES_DROPPED
        values[SERIES_DROPPED.name] = {(name,): len(labels) for name, labels in dropped.items()}
        for name in sorted(families):
            yield _exposed(families[name], values[name])


def _check(sample: Sample) -> None:
    family = sample.family
    if len(sample.label_values) != len(family.labels):
        raise ValueError(f"{family.name} has the labels {family.labels}, not {sample.label_values}")
    if isinstance(sample.value, Histogram) != (family.type is MetricType.HISTOGRAM):
        raise ValueError(f"{family.name} is a {family.type.value}, and got {sample.value!r}")


def _sum(family: Family, first: float | Histogram, second: float | Histogram) -> float | Histogram:
    if isinstance(first, Histogram) and isinstance(second, Histogram):
        if first.bounds != second.bounds:
            raise ValueError(f"{family.name} has histograms of different bounds")
        total = Histogram(first.bounds)
        total.counts = [a + b for a, b in zip(first.counts, second.counts, strict=True)]
        total.sum = first.sum + second.sum
        return total
    if isinstance(first, Histogram) or isinstance(second, Histogram):
        raise ValueError(f"{family.name} has a histogram and a number in one series")
    return first + second


def _exposed(family: Family, series: dict[tuple[str, ...], float | Histogram]) -> Metric:
    """A family with its series as prometheus-client exposes them."""
    if family.type is MetricType.HISTOGRAM:
        histograms = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for label_values, value in series.items():
            if isinstance(value, Histogram):
                histograms.add_metric(list(label_values), list(_cumulative(value)), value.sum)
        return histograms
    numbers: CounterMetricFamily | GaugeMetricFamily
    if family.type is MetricType.COUNTER:
        numbers = CounterMetricFamily(family.name, family.help, labels=family.labels)
    else:
        numbers = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for label_values, value in series.items():
        if not isinstance(value, Histogram):
            numbers.add_metric(list(label_values), value)
    return numbers


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    """(upper bound, observations up to it), as the exposition format wants them."""
    total = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        yield ("+Inf" if bound == float("inf") else repr(float(bound))), total
