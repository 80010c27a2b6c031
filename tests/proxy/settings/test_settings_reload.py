"""A reload changes the settings that say they are live, all of them and no other, and names the rest."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from proxy.settings import (
    AdminSettings,
    ClientSettings,
    ClusterSettings,
    CommandSettings,
    CrossSlotTransactions,
    ListenerSettings,
    ReadRuleSettings,
    ReadSettings,
    Settings,
)
from proxy.settings.load import load
from proxy.settings.reload import Changed, applied, changes
from proxy.settings.schema import table_of
from proxy.settings.show import facts_of, toml_of
from routing.topology import Address
from tests.proxy.settings.test_settings_show import all_settings

OLD = Settings()
LISTENER = ListenerSettings(Address("127.0.0.1", 9001))


def test_the_live_settings_are_these() -> None:
    """A setting becomes live only on purpose: something must follow it at run time."""
    live = {".".join(map(str, path)) for path, option in table_of(Settings).options() if option.says.is_live}
    assert live == {
        "log_level",
        "stop_deadline_seconds",
        "cluster.refresh_interval_seconds",
        "commands.cross_slot_transactions",
        "clients.password",
        "clients.password_file",
        "clients.connections_max",
        "clients.open_requests_max",
        "clients.unsent_bytes_max",
        "clients.unsent_bytes_hard_max",
        "clients.request_bytes_max",
        "clients.idle_timeout_seconds",
        "clients.requests_per_second",
        "clients.requests_burst",
        "users.0.name",
        "users.0.password",
        "users.0.password_file",
        "users.0.priority",
        "users.0.requests_per_second",
        "users.0.requests_burst",
        "users.0.in_flight_max",
        "reads.max_staleness_seconds",
        "reads.settle_seconds",
        "reads.replica_timeout_seconds",
        "reads.circuit_stall_seconds",
        "reads.zone",
        "reads.zones",
        "reads.rules.0.prefix",
        "reads.rules.0.level",
        "reads.rules.0.max_staleness_seconds",
        "hot.sample_every",
        "hot.window_seconds",
        "hot.counters",
    }


def test_what_differs_is_named_with_both_values() -> None:
    new = replace(
        OLD,
        log_level="debug",
        cluster=ClusterSettings(seeds=(Address("::1", 7000), Address("b", 7001))),
        commands=CommandSettings(cross_slot_transactions=CrossSlotTransactions.PER_SLOT),
    )
    assert changes(OLD, new) == (
        Changed("log_level", "info", "debug", is_live=True),
        Changed("cluster.seeds", ["127.0.0.1:7600"], ["[::1]:7000", "b:7001"], is_live=False),
        Changed("commands.cross_slot_transactions", "refuse", "per_slot", is_live=True),
    )
    assert changes(OLD, OLD) == ()


def test_a_table_that_came_or_went_is_named_too() -> None:
    more = replace(OLD, listeners=(*OLD.listeners, LISTENER))
    values = {
        "address": "127.0.0.1:9001",
        "level": "auto",
        "max_staleness_seconds": 0.0,
        "priority": "normal",
    }
    assert changes(OLD, more) == tuple(
        Changed(f"listeners[1].{name}", None, value, is_live=False) for name, value in values.items()
    )
    assert changes(more, OLD) == tuple(
        Changed(f"listeners[1].{name}", value, None, is_live=False) for name, value in values.items()
    )


def test_rules_for_prefixes_are_replaced_whole() -> None:
    """A table of listeners stays, because its address is not live; rules come, go and change places at once."""
    rules = (ReadRuleSettings("a:", "eventual"), ReadRuleSettings("b:", "session"))
    old = replace(OLD, reads=ReadSettings(rules=rules))
    new = replace(
        OLD, reads=ReadSettings(rules=rules[1:]), listeners=(replace(LISTENER, level="eventual"), LISTENER)
    )
    in_effect = applied(old, new)
    assert in_effect.reads.rules == rules[1:]
    assert in_effect.listeners == OLD.listeners
    assert {changed.setting for changed in changes(old, in_effect)} == {
        "reads.rules[0].prefix",
        "reads.rules[0].level",
        "reads.rules[1].prefix",
        "reads.rules[1].level",
        "reads.rules[1].max_staleness_seconds",
    }


def test_no_secret_is_shown() -> None:
    """Neither the old one nor the new one; whether there is one is no secret."""
    first = replace(OLD, clients=ClientSettings(password="hunter2"), admin=AdminSettings(token="hunter2"))
    second = replace(OLD, clients=ClientSettings(password="hunter3"))
    assert changes(first, second) == (
        Changed("clients.password", "(hidden)", "(hidden)", is_live=True),
        Changed("admin.token", "(hidden)", "", is_live=False),
    )


def test_a_number_that_the_record_cannot_carry_is_shown_as_text() -> None:
    largest = replace(OLD, clients=ClientSettings(connections_max=2**63 - 1))
    larger = replace(OLD, clients=ClientSettings(connections_max=2**63))
    assert [changed.after for changed in changes(OLD, largest)] == [2**63 - 1]
    assert [changed.after for changed in changes(OLD, larger)] == ["9223372036854775808"]


@given(all_settings, all_settings)
def test_what_is_live_is_applied_and_nothing_else(old: Settings, new: Settings) -> None:
    """After a reload the sources differ from what is in effect by what needs a restart, and by nothing else."""
    differing = changes(old, new)
    in_effect = applied(old, new)
    assert changes(old, in_effect) == tuple(changed for changed in differing if changed.is_live)
    assert changes(in_effect, new) == tuple(changed for changed in differing if not changed.is_live)
    assert applied(in_effect, new) == in_effect


def test_config_show_marks_what_is_live() -> None:
    text = toml_of(load())
    assert "on standard error. (live)\nlog_level = " in text
    assert text.count(" (live)\n") == sum(option.says.is_live for _, option in table_of(Settings).options())
    live = {fact["setting"] for fact in facts_of(load()) if fact["live"]}
    assert "log_level" in live
    assert "listeners[0].address" not in live
