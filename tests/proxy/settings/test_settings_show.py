"""What ``config show`` writes loads to the same settings, and holds no secret."""

import dataclasses
import string
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.settings import (
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
    ReadRuleSettings,
    ReadSettings,
    Settings,
    SnapshotSettings,
    UserSettings,
)
from proxy.settings.load import Loaded, Override, load
from proxy.settings.schema import table_of
from proxy.settings.show import facts_of, toml_of
from proxy.settings.values import LOG_LEVELS, OFFERED_LEVELS, RULE_LEVELS, SNAPSHOT_SECONDS_MAX
from routing.levels import AUTO, Level
from routing.topology import Address

hosts = st.text(string.ascii_lowercase + string.digits + ".-", min_size=1) | st.just("::1")
addresses = st.builds(Address, hosts, st.integers(1, 65535))
counts = st.integers(1, 10**30)
durations = st.floats(0, 86_400, exclude_min=True)
clients = st.builds(
    lambda soft, more, **rest: ClientSettings(
        unsent_bytes_max=soft, unsent_bytes_hard_max=soft + more, **rest
    ),
    soft=counts,
    more=st.integers(0, 10**9),
    connections_max=counts,
    open_requests_max=counts,
    request_bytes_max=counts,
    idle_timeout_seconds=st.floats(0, 1e300),
)
hots = st.builds(
    HotSettings,
    sample_every=st.integers(0, 1_000_000),
    window_seconds=st.floats(1, 3600),
    counters=st.integers(16, 1000),
)
names = st.from_regex("[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)
hooks = st.builds(
    lambda first, more, **rest: HookSettings(
        retry_first_seconds=first, retry_max_seconds=min(first + more, 86_400), **rest
    ),
    first=durations,
    more=durations,
    name=names,
    events=st.lists(st.sampled_from(["*", "failover", "migration_*"]), min_size=1).map(tuple),
    slot=st.integers(-1, 16383),
    command=st.lists(words, min_size=1).map(tuple),
    timeout_seconds=durations,
    attempts_max=counts,
)
bounds = st.floats(0, 86_400)


def bounded(kind: Any, levels: tuple[str, ...], **rest: Any) -> Any:
    """Settings of ``kind`` with a level, and with a bound where the level takes one."""
    return st.builds(
        lambda level, bound, **rest: kind(
            level=level,
            max_staleness_seconds=bound if level == Level.BOUNDED_STALENESS.value else 0.0,
            **rest,
        ),
        level=st.sampled_from(levels),
        bound=bounds,
        **rest,
    )


zones = st.builds(
    NodeZone, addresses, st.text(string.ascii_letters + string.digits + "-=, é", min_size=1).map(str.strip)
).filter(lambda each: each.zone != "")
rules = bounded(ReadRuleSettings, RULE_LEVELS, prefix=words)
snapshots = st.builds(
    lambda deadline, drain, lease, hold, limit, ttl, **rest: SnapshotSettings(
        open_deadline_seconds=deadline,
        drain_seconds=min(drain, deadline),
        member_ttl_seconds=lease,
        hold_seconds=min(hold, lease / 2),
        age_seconds_max=limit,
        ttl_seconds=min(ttl, limit) if limit else ttl,
        **rest,
    ),
    deadline=durations,
    drain=durations,
    lease=st.floats(0.5, 3600),
    hold=st.floats(0, 60, exclude_min=True),
    limit=st.floats(0, SNAPSHOT_SECONDS_MAX),
    ttl=st.floats(0, SNAPSHOT_SECONDS_MAX),
    open_max=st.integers(1, 64),
    preserved_bytes_max=st.integers(0, 10**30),
    on_budget=st.sampled_from(OnBudget),
    on_preserve_failure=st.sampled_from(OnPreserveFailure),
    memory_percent_max=st.integers(1, 100),
    sweep_pause_seconds=st.floats(0, 60),
)
reads = st.builds(
    ReadSettings,
    max_staleness_seconds=durations,
    settle_seconds=bounds,
    replica_timeout_seconds=durations,
    circuit_stall_seconds=bounds,
    sample_interval_seconds=durations,
    verify_interval_seconds=bounds,
    verify_keys=st.integers(1, 1000),
    quarantine_seconds=durations,
    zone=st.text(),
    zones=st.lists(zones, max_size=3, unique_by=lambda each: each.address).map(tuple),
    rules=st.lists(rules, max_size=3, unique_by=lambda rule: rule.prefix).map(tuple),
)
all_settings = (
    st.lists(addresses, min_size=2, max_size=5, unique=True)
    .flatmap(
        lambda ports: st.builds(
            Settings,
            log_level=st.sampled_from(LOG_LEVELS),
            stop_deadline_seconds=durations,
            cluster=st.builds(
                ClusterSettings,
                seeds=st.lists(addresses, min_size=1, max_size=4).map(tuple),
                username=st.text(),
                connect_timeout_seconds=durations,
                request_deadline_seconds=durations,
                refresh_interval_seconds=durations,
                unsent_bytes_max=counts,
                private_connections_max=st.integers(0, 10**9),
            ),
            listeners=st.tuples(
                *(
                    bounded(ListenerSettings, (AUTO, *OFFERED_LEVELS), address=st.just(port))
                    for port in ports[1:]
                )
            ),
            clients=clients,
            commands=st.builds(
                CommandSettings,
                cross_slot_transactions=st.sampled_from(CrossSlotTransactions),
                script_cache_bytes_max=st.integers(0, 10**30),
            ),
            reads=reads,
            snapshots=snapshots,
            hot=hots,
            cache=st.builds(CacheSettings, bytes_max=st.integers(0, 10**30), value_bytes_max=counts),
            admin=st.just(AdminSettings(Address("127.0.0.1", ports[0].port), token="")),
            hooks=st.lists(hooks, max_size=3, unique_by=lambda hook: hook.name).map(tuple),
        )
    )
    .filter(lambda settings: settings.admin.address not in [each.address for each in settings.listeners])
)


@given(all_settings)
def test_shown_settings_load_to_the_same(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "shown.toml")
        file.write_bytes(toml_of(Loaded(settings, {})).encode())
        assert load(file=file).settings == settings


def test_every_option_is_shown_with_its_meaning() -> None:
    """A table and an explanation for each field there is, so that none is forgotten."""
    with_tables = Settings(
        reads=ReadSettings(rules=(ReadRuleSettings(),)),
        overload=OverloadSettings(rules=(PriorityRuleSettings(),)),
        users=(UserSettings(),),
        hooks=(HookSettings(),),
    )
    text = toml_of(Loaded(with_tables, {}))
    document = tomllib.loads(text)
    lines = text.split("\n")
    for path, option in table_of(Settings).options():
        value: object = document
        for part in path:
            value = value[part]  # type: ignore[index]  # the path's parts fit the document's tables
        line = next(number for number, line in enumerate(lines) if line.startswith(f"{option.name} = "))
        assert lines[line - 1].startswith("# ")
        assert option.says.meaning.endswith(".")


def test_without_a_hook_an_example_is_shown_as_a_comment() -> None:
    """What ``config show`` writes is a file to start from: uncommented, it lacks only a name and a target."""
    text = toml_of(load())
    assert "hooks" not in tomllib.loads(text)
    example = (
        text[text.index("# [[hooks]]") :].replace("\n# ", "\n").replace("# [[", "[[").replace("\n#\n", "\n")
    )
    assert tomllib.loads(example)["hooks"][0]["attempts_max"] == HookSettings().attempts_max


def test_a_table_within_a_table_is_shown_under_its_whole_name() -> None:
    """Without a rule as a comment, to start from; with rules, each with its own values."""
    assert "\n# [[reads.rules]]\n#\n# # How the keys begin" in toml_of(load())
    rules = (ReadRuleSettings("a:", "eventual"), ReadRuleSettings("b:", "bounded_staleness", 0.5))
    shown = Loaded(Settings(reads=ReadSettings(rules=rules)), {})
    written = tomllib.loads(toml_of(shown))["reads"]["rules"]
    assert [rule["prefix"] for rule in written] == ["a:", "b:"]
    [fact] = [fact for fact in facts_of(shown) if fact["setting"] == "reads.rules[1].max_staleness_seconds"]
    assert fact["value"] == 0.5
    assert fact["environment"] == "STEADYREAD_READS__RULES__1__MAX_STALENESS_SECONDS"
    assert fact["live"]


def test_origins_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('log_level = "debug"\n[cluster]\nseeds = ["h:1",\n"h:2"]\n')
    result = load(
        file=file,
        environment={"STEADYREAD_STOP_DEADLINE_SECONDS": "1.5"},
        overrides=[Override("listeners", ["h:3", "h:4"], "--listen")],
    )
    text = toml_of(result)
    assert f'\nlog_level = "debug"  # {file}:1\n' in text
    assert "\nstop_deadline_seconds = 1.5  # environment STEADYREAD_STOP_DEADLINE_SECONDS\n" in text
    assert f'\nseeds = ["h:1", "h:2"]  # {file}:3\n' in text
    assert text.count("  # command line --listen\n") == 2
    assert '\ncross_slot_transactions = "refuse"  # default\n' in text
    assert {fact["setting"]: fact["origin"] for fact in facts_of(result)}["listeners[1].address"] == (
        "command line --listen"
    )


def test_no_secret_is_shown() -> None:
    settings = Settings(
        cluster=dataclasses.replace(Settings().cluster, password="hunter2"),
        clients=dataclasses.replace(Settings().clients, password="hunter2"),
        admin=dataclasses.replace(Settings().admin, token="hunter2"),
        reads=ReadSettings(token_secret="hunter2"),
        hooks=(HookSettings(authorization="hunter2"),),
    )
    text = toml_of(Loaded(settings, {}))
    assert "hunter2" not in text
    assert text.count('= "(set)"  # default') == 5
    assert "hunter2" not in str(facts_of(Loaded(settings, {})))
    assert "password" not in tomllib.loads(text)["cluster"]


@pytest.mark.parametrize(
    ("name", "kind"), [("snapshots", SnapshotSettings), ("hot", HotSettings), ("cache", CacheSettings)]
)
def test_the_operators_page_lists_the_settings(name: str, kind: type) -> None:
    """Each with its default and its meaning, as ``config show`` has them."""
    text = toml_of(load())
    shown = text[text.index(f"[{name}]\n") :]
    page = Path(__file__).parents[3].joinpath("docs", f"{name}.md").read_text()
    listed = [line.split(" | ") for line in page[page.index("## Settings") :].splitlines()[6:]]
    options = list(table_of(kind).options())
    assert len(listed) == len(options)
    for (name, default, meaning), (_, option) in zip(listed, options, strict=True):
        assert name == f"| `{option.name}`"
        assert f"\n{option.name} = {default.strip('`')}  # default\n" in shown
        assert meaning == f"{option.says.meaning} |"


def test_snapshot_settings_come_from_the_environment_too(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[snapshots]\nopen_max = 3\nttl_seconds = 60\n")
    environment = {
        "STEADYREAD_SNAPSHOTS__TTL_SECONDS": "90",
        "STEADYREAD_SNAPSHOTS__ON_BUDGET": "warn",
    }
    result = load(file=file, environment=environment)
    assert result.settings.snapshots == SnapshotSettings(
        open_max=3, ttl_seconds=90.0, on_budget=OnBudget.WARN
    )
    facts = {fact["setting"]: fact for fact in facts_of(result)}
    assert facts["snapshots.on_budget"]["value"] == "warn"
    assert facts["snapshots.on_preserve_failure"]["value"] == "abort"
    assert not facts["snapshots.ttl_seconds"]["live"]
