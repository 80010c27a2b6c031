"""An observation: what one round of discovery saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from routing.cluster_nodes import Report
from routing.topology import TopologyView


@dataclass(frozen=True, slots=True)
class Observation:
    """What one round of discovery saw: all that events are made of."""

    at: float  # Unix seconds
    view: TopologyView  # as ``routing.discovery.merge`` gives it: every node has an id
    reports: tuple[Report, ...]
    problems: Mapping[str, str] = field(default_factory=dict)  # node id -> why it did not answer
    keys_in_slot: Mapping[tuple[int, str], int] = field(default_factory=dict)  # (open slot, node id) -> keys
