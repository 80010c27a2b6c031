"""The alert rules in docs/prometheus hold what they say, as Prometheus's own promtool reads them.

promtool plays the faults that stand beside the rules, and what was recorded from a proxy. What it cannot know is tested
without it: that the metrics exist with these labels, that each alert has its fault, that thresholds are the limits of
the code, and that docs/alerts.md tells the same. promtool comes with Debian's package prometheus; it is looked for on
the path, or where PROMTOOL says.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import proxy
from proxy.app import Proxy
from proxy.metrics import Family, Metrics, MetricType
from proxy.settings import (
    AdminSettings,
    ClientSettings,
    ClusterSettings,
    ListenerSettings,
    OverloadSettings,
    Settings,
)
from proxy.upstream.load import rules_of
from routing.priority import Priority
from routing.topology import Address

DOCS = Path(__file__).resolve().parents[2] / "docs"
RULES_FILE = DOCS / "prometheus" / "steadyread-alerts.yml"
FAULTS_FILE = DOCS / "prometheus" / "steadyread-alerts-test.yml"

# Metrics that the rules name and the proxy does not declare yet -> their labels. What it declares must leave this.
PENDING: Mapping[str, tuple[str, ...]] = {}
OF_PROMETHEUS: Mapping[str, tuple[str, ...]] = {"up": ()}
# Labels that Prometheus gives to each series.
TARGET: Mapping[str, str] = {"job": "steadyread", "instance": "proxy-1:7380"}

SCRAPES = 12  # of the recording
FIRING_IN_RECORDING = [
    "SteadyreadClientsRejected",
    "SteadyreadDiscoveryFailing",
    "SteadyreadRequestsExpired",
    "SteadyreadSlotsUnowned",
]

# (name, labels) -> a value for each scrape
Recording = dict[tuple[str, tuple[tuple[str, str], ...]], list[str]]


def rules() -> list[dict[str, Any]]:
    """Those of all groups, in the order of the file."""
    return [rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]]


def situations() -> list[dict[str, Any]]:
    """What promtool plays: each has series, and what fires when."""
    played: list[dict[str, Any]] = yaml.safe_load(FAULTS_FILE.read_text())["tests"]
    return played


# -- by promtool


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which(os.environ.get("PROMTOOL", "promtool"))
    if found is None:
        pytest.skip("promtool is not here: install Debian's prometheus, or name it in PROMTOOL")
    return found


def run(*command: str | Path, text: str = "") -> None:
    """Fails with what the program says."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_loads_the_rules(promtool: str) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES_FILE)


def test_each_alert_fires_on_its_fault_and_none_on_what_is_normal(promtool: str) -> None:
    run(promtool, "test", "rules", FAULTS_FILE)


async def test_what_is_recorded_from_a_proxy_fires_what_it_should(promtool: str, tmp_path: Path) -> None:
    """A proxy whose nodes are gone, with one client too many. All that it exposes is played, 30 s for each scrape.

    Promise 9: a refusal says what, why and what to do; and somebody hears of it.
    """
    texts = await record_without_nodes()
    run(promtool, "check", "metrics", text=texts[-1])
    minutes = len(texts) // 2
    situation = {
        "interval": "30s",
        "input_series": [
            {"series": series_text(name, dict(labels)), "values": " ".join(values)}
            for (name, labels), values in recording_of(texts).items()
        ],
        "promql_expr_test": [
            {
                "expr": 'sum by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minutes}m",
                "exp_samples": [
                    {"labels": series_text("", {"alertname": name}), "value": 1}
                    for name in FIRING_IN_RECORDING
                ],
            }
        ],
    }
    played = tmp_path / "recorded.yml"
    played.write_text(
        yaml.safe_dump({"rule_files": [str(RULES_FILE)], "evaluation_interval": "30s", "tests": [situation]})
    )
    run(promtool, "test", "rules", played)


async def record_without_nodes() -> list[str]:
    """What a proxy exposes while no node answers: between two scrapes a look fails, a request, and a connection."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: who connects is refused
        here = Address("127.0.0.1", 0)
        settings = Settings(
            log_level="error",
            cluster=ClusterSettings(
                seeds=(Address("127.0.0.1", nobody.getsockname()[1]),),
                request_deadline_seconds=0.05,
                refresh_interval_seconds=0.02,
            ),
            listeners=(ListenerSettings(here),),
            clients=ClientSettings(connections_max=1),
            admin=AdminSettings(here),
        )
        served, texts = Proxy(settings), []
        async with trio.open_nursery() as nursery:
            started = await nursery.start(partial(served.run, with_signals=False))
            with trio.fail_after(30):
                address = started.listeners[0]
                async with await trio.open_tcp_stream(address.host, address.port) as client:
                    for _ in range(SCRAPES):
                        texts.append(generate_latest(served.metrics.registry).decode())
                        looks = served.keeper.discovery.failed_looks_total
                        await client.send_all(b"GET key\r\n")
                        assert (await client.receive_some()).startswith(b"-NOTREADY")
                        async with await trio.open_tcp_stream(address.host, address.port) as one_too_many:
                            assert (await one_too_many.receive_some()).startswith(
                                b"-ERR max number of clients"
                            )
                        while served.keeper.discovery.failed_looks_total == looks:
                            await trio.sleep(0.005)
            served.stop()
    return texts


def recording_of(texts: list[str]) -> Recording:
    """Scrapes in turn as series, with the target's labels; "_" where a scrape did not have one."""
    found: Recording = {("up", tuple(TARGET.items())): ["1"] * len(texts)}
    for number, text in enumerate(texts):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, tuple({**sample.labels, **TARGET}.items())
                found.setdefault(key, ["_"] * len(texts))[number] = repr(sample.value)
    return found


def series_text(name: str, labels: Mapping[str, str]) -> str:
    return name + "{" + ", ".join(f'{label}="{value}"' for label, value in labels.items()) + "}"


# -- without it


def test_each_alert_is_silent_then_fires_then_is_silent_again() -> None:
    assert len(rules()) == len({rule["alert"] for rule in rules()})
    of_alert = {situation["name"]: situation for situation in situations() if "alert_rule_test" in situation}
    assert list(of_alert) == [rule["alert"] for rule in rules()]
    for name, situation in of_alert.items():
        looks = situation["alert_rule_test"]
        assert {look["alertname"] for look in looks} == {name}
        times = [seconds(look["eval_time"]) for look in looks]
        assert times == sorted(times)
        assert [len(look.get("exp_alerts", [])) for look in looks] == [0, 1, 0], name


def test_each_normal_situation_is_watched_for_every_alert_up_to_its_end() -> None:
    normal = [situation for situation in situations() if "alert_rule_test" not in situation]
    assert len(normal) == 5
    for situation in normal:
        [look] = situation["promql_expr_test"]
        assert look == {"expr": 'count_over_time(ALERTS{alertstate="firing"}[1h])', "eval_time": "60m"}


def test_each_rule_has_a_severity_a_duration_and_words_that_name_the_proxy() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert re.fullmatch(r"\d+m", rule["for"]), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"], rule["alert"]


def test_whoever_alerts_of_a_node_names_it() -> None:
    labels_of = known_metrics()
    of_nodes = [
        rule
        for rule in rules()
        if any("node" in labels_of[name] for name, _ in metrics_named(rule["expr"])[0])
    ]
    assert len(of_nodes) == 5
    for rule in of_nodes:
        assert "{{ $labels.node }}" in rule["annotations"]["summary"], rule["alert"]


def test_every_metric_of_a_rule_is_declared_with_these_labels() -> None:
    labels_of = known_metrics()
    for rule in rules():
        named, grouped_by = metrics_named(rule["expr"])
        assert named, rule["alert"]
        assert grouped_by <= set(TARGET), rule["alert"]
        for name, labels in named:
            assert name in labels_of, f"{rule['alert']} names {name}, which nobody exposes"
            assert labels <= {*labels_of[name], *TARGET}, (
                f"{rule['alert']}: {name} has no such labels: {labels}"
            )


def test_every_series_that_is_played_is_declared_with_these_labels() -> None:
    labels_of = known_metrics()
    for situation in situations():
        for series in situation["input_series"]:
            [(name, labels)], _ = metrics_named(series["series"])
            assert name in labels_of, f"{situation['name']} plays {name}, which nobody exposes"
            assert labels == {*labels_of[name], *TARGET}, f"{situation['name']}: {series['series']}"


def test_every_pending_metric_is_named_by_a_rule_and_is_still_to_be_declared() -> None:
    named = {name for rule in rules() for name, _ in metrics_named(rule["expr"])[0]}
    assert set(PENDING) <= named
    assert not set(PENDING) & set(declared_metrics()), "these exist by now: take them out of PENDING"


def test_thresholds_are_the_limits_of_the_code() -> None:
    """The limit's floor, and the wait after which normal requests are shed."""
    expression_of = {rule["alert"]: rule["expr"] for rule in rules()}
    code = rules_of(OverloadSettings())
    normal_wait = code.admission.wait_seconds[Priority.NORMAL]
    assert f"steadyread_node_limit_requests <= {code.limit.floor} " in expression_of["SteadyreadLimitAtFloor"]
    assert expression_of["SteadyreadQueueWaitLong"].endswith(f" > {normal_wait}")


def test_the_documentation_has_a_row_for_each_alert() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (DOCS / "alerts.md").read_text().splitlines()
        if line.startswith("| `Steadyread")
    ]
    assert [row[:3] for row in rows] == [
        [f"`{rule['alert']}`", rule["labels"]["severity"], rule["for"]] for rule in rules()
    ]
    assert all(len(row) == 5 and all(row) for row in rows)


def seconds(duration: str) -> int:
    """Of what Prometheus calls "12m30s"."""
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found, duration
    return int(found[1] or 0) * 60 + int(found[2] or 0)


# -- which metrics there are


def known_metrics() -> dict[str, tuple[str, ...]]:
    """Name of a series, as a query names it -> its labels, those of the target aside."""
    return {**OF_PROMETHEUS, **of_process(), **PENDING, **declared_metrics()}


def declared_metrics() -> dict[str, tuple[str, ...]]:
    """Those of all families that stand in the proxy's modules."""
    found: dict[str, tuple[str, ...]] = {}
    for module in pkgutil.walk_packages(proxy.__path__, "proxy."):
        if not module.name.endswith("__main__"):
            for value in vars(import_module(module.name)).values():
                for family in families_in(value):
                    found |= series_of(family)
    return found


def families_in(value: object) -> Iterator[Family]:
    if isinstance(value, Family):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from families_in(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from families_in(one)


def series_of(family: Family) -> dict[str, tuple[str, ...]]:
    if family.type is not MetricType.HISTOGRAM:
        return {family.name: family.labels}
    return {
        f"{family.name}_bucket": (*family.labels, "le"),
        f"{family.name}_count": family.labels,
        f"{family.name}_sum": family.labels,
    }


def of_process() -> dict[str, tuple[str, ...]]:
    """What each registry has of its process."""
    return {
        sample.name: tuple(sample.labels)
        for family in Metrics().registry.collect()
        for sample in family.samples
        if sample.name.startswith("process_")
    }


# -- which metrics a query names

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^]]*\]|[A-Za-z_:][\w:]*|\d[\w.]*|\S')
_BEFORE_LABELS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_OPERATORS = {"and", "or", "unless", "bool", "offset"}


def metrics_named(query: str) -> tuple[list[tuple[str, set[str]]], set[str]]:
    """(metric, labels that its selector names) for each, and the labels that the query groups or matches by."""
    tokens = [*_TOKEN.findall(query), ""]
    named: list[tuple[str, set[str]]] = []
    grouped_by: set[str] = set()
    at = 0
    while at < len(tokens) - 1:
        token, after = tokens[at], tokens[at + 1]
        at += 1
        if not re.match(r"[A-Za-z_:]", token) or token in _OPERATORS:
            continue
        if token in _BEFORE_LABELS or after == "{":
            end = tokens.index("}" if after == "{" else ")", at)
            labels = {each for each in tokens[at:end] if re.match(r"[A-Za-z_]", each)}
            at = end + 1
            if token in _BEFORE_LABELS:
                grouped_by |= labels
            else:
                named.append((token, labels))
        elif after != "(" and after not in _BEFORE_LABELS:  # else a function or an aggregation
            named.append((token, set()))
    return named, grouped_by


@pytest.mark.parametrize(
    ("query", "named", "grouped_by"),
    [
        ("a", [("a", set())], set()),
        ('rate(a_total{b="c", d!~"e{f}"}[5m]) > 0.5e3', [("a_total", {"b", "d"})], set()),
        ("sum by (b, c) (rate(a[2m])) / max(d) without (e)", [("a", set()), ("d", set())], {"b", "c", "e"}),
        ("a == 1 and on (b) c unless d offset 5m", [("a", set()), ("c", set()), ("d", set())], {"b"}),
        ("histogram_quantile(0.9, a) > bool 2", [("a", set())], set()),
    ],
)
def test_the_metrics_of_a_query_are_found(
    query: str, named: list[tuple[str, set[str]]], grouped_by: set[str]
) -> None:
    assert metrics_named(query) == (named, grouped_by)
