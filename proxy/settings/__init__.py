"""Settings: every option with its default, its meaning and its limits.

Here stand the values alone, which the whole proxy reads. ``proxy.settings.load`` makes them from the command
line, the environment and a file; ``proxy.settings.show`` writes them down again.
"""

from proxy.settings.values import (
    AdminSettings,
    CacheSettings,
    ClientSettings,
    ClusterSettings,
    CommandSettings,
    CrossSlotTransactions,
    HookSettings,
    HotSettings,
    ListenerSettings,
    NodeZone,
    OnBudget,
    OnPreserveFailure,
    OverloadSettings,
    PriorityRuleSettings,
    ReadAt,
    ReadRuleSettings,
    ReadSettings,
    Settings,
    SnapshotSettings,
    UserSettings,
)

__all__ = [
    "AdminSettings",
    "CacheSettings",
    "ClientSettings",
    "ClusterSettings",
    "CommandSettings",
    "CrossSlotTransactions",
    "HookSettings",
    "HotSettings",
    "ListenerSettings",
    "NodeZone",
    "OnBudget",
    "OnPreserveFailure",
    "OverloadSettings",
    "PriorityRuleSettings",
    "ReadAt",
    "ReadRuleSettings",
    "ReadSettings",
    "Settings",
    "SnapshotSettings",
    "UserSettings",
]
