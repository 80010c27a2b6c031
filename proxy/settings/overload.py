"""The overload settings as the routing's own values, and what must hold of them beyond the limits of single options."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.settings.fault import Fault
from proxy.settings.positions import Path
from proxy.settings.schema import dotted
from proxy.settings.values import OverloadSettings
from routing.admission import AdmissionRules
from routing.limit import LimitRules
from routing.priority import PriorityRule, closest_first, parse_priority


def limit_rules(overload: OverloadSettings) -> LimitRules:
    """How each node's limit moves."""
    return LimitRules(
        floor=overload.limit_min,
        ceiling=overload.limit_max,
        first=min(max(LimitRules().first, overload.limit_min), overload.limit_max),
        slack_seconds=overload.slack_ms / 1000,
    )


def admission_rules(overload: OverloadSettings) -> AdmissionRules:
    """Who waits for a node, and how long."""
    waits = (overload.wait_critical_ms, overload.wait_normal_ms, overload.wait_background_ms)
    critical, normal, background = (milliseconds / 1000 for milliseconds in waits)
    return AdmissionRules(wait_seconds=(critical, normal, background), waiting_max=overload.waiting_max)


def priority_rules(overload: OverloadSettings) -> tuple[PriorityRule, ...]:
    """The rules for keys, longest prefix first."""
    return closest_first(
        [
            PriorityRule(rule.prefix.encode(), int(parse_priority(rule.priority)))
            for rule in overload.rules
            if rule.priority
        ]
    )


def overload_faults(overload: OverloadSettings) -> Iterator[Fault]:
    """All that is wrong with them, in the order of the options."""
    place: Path = ("overload",)
    if overload.limit_max < overload.limit_min:
        yield Fault(
            (*place, "limit_max"),
            overload.limit_max,
            f"give at least overload.limit_min, which is {overload.limit_min}",
            also=(*place, "limit_min"),
        )
    waits = (overload.wait_background_ms, overload.wait_normal_ms, overload.wait_critical_ms)
    if list(waits) != sorted(waits):
        yield Fault(
            (*place, "wait_critical_ms"),
            overload.wait_critical_ms,
            "a request must wait as long as a less important one: give wait_background_ms, wait_normal_ms and "
            f"wait_critical_ms in this order of size; they are {waits[0]:g}, {waits[1]:g} and {waits[2]:g}",
            also=(*place, "wait_normal_ms"),
        )
    index_of_prefix: dict[str, int] = {}
    for index, rule in enumerate(overload.rules):
        path: Path = (*place, "rules", index)
        if not rule.prefix:
            message = "give how the keys begin; the priority of all others is a listener's"
            yield Fault((*path, "prefix"), rule.prefix, message)
        elif (other := index_of_prefix.setdefault(rule.prefix, index)) != index:
            taken: Path = (*place, "rules", other, "prefix")
            message = f"is taken by {dotted(taken)}; give another"
            yield Fault((*path, "prefix"), rule.prefix, message, also=taken)
        if not rule.priority:
            yield Fault((*path, "priority"), rule.priority, "give the priority of commands on these keys")
