"""Settings come from four sources in a fixed order, and whatever is wrong is named where it stands."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.settings import (
    CrossSlotTransactions,
    HookSettings,
    ListenerSettings,
    NodeZone,
    ReadRuleSettings,
    Settings,
)
from proxy.settings.load import Loaded, Origin, Override, Problem, SettingsError, load
from proxy.settings.schema import table_of, variable_of
from proxy.settings.show import toml_of
from proxy.settings.values import EVENT_VARIABLES
from routing.topology import Address

VARIABLES = [variable_of(path) for path, _ in table_of(Settings).options()] + [
    "STEADYREAD_LISTENERS",
    "STEADYREAD_CLUSTER",
    "STEADYREAD_",
    "STEADYREAD___",
    "STEADYREAD_LISTENERS__1__ADDRESS",
    "STEADYREAD_LISTENERS__x",
    "STEADYREAD_READS__RULES",
    "STEADYREAD_READS__RULES__1__PREFIX",
    "STEADYREAD_READS__RULES__0",
]


def problems(
    tmp_path: Path,
    text: str | bytes = "",
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[Override] = (),
) -> list[str]:
    """What the loader says of these sources, with the file called FILE."""
    file = tmp_path / "steadyread.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as raised:
        load(file=file, environment=environment, overrides=overrides)
    return [str(problem).replace(str(file), "FILE") for problem in raised.value.problems]


def loaded(tmp_path: Path, text: str, **sources: object) -> Loaded:
    file = tmp_path / "steadyread.toml"
    file.write_text(text)
    return load(file=file, **sources)  # type: ignore[arg-type]  # the caller names the parameters of load


def test_nothing_given_is_the_defaults() -> None:
    assert load() == Loaded(Settings(), {})


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    """Command line over environment over file over default, option by option."""
    result = loaded(
        tmp_path,
        "[clients]\nconnections_max = 1\nopen_requests_max = 1\nrequest_bytes_max = 1\n",
        environment={
            "STEADYREAD_CLIENTS__CONNECTIONS_MAX": "2",
            "STEADYREAD_CLIENTS__OPEN_REQUESTS_MAX": "2",
            "UNRELATED": "x",
        },
        overrides=[Override("clients.connections_max", "3", "--set")],
    )
    clients = result.settings.clients
    assert (clients.connections_max, clients.open_requests_max, clients.request_bytes_max) == (3, 2, 1)
    assert clients.unsent_bytes_max == Settings().clients.unsent_bytes_max
    assert str(result.origin_of(("clients", "connections_max"))) == "command line --set"
    assert str(result.origin_of(("clients", "open_requests_max"))) == (
        "environment STEADYREAD_CLIENTS__OPEN_REQUESTS_MAX"
    )
    assert str(result.origin_of(("clients", "request_bytes_max"))) == f"{tmp_path / 'steadyread.toml'}:4"
    assert str(result.origin_of(("clients", "unsent_bytes_max"))) == "default"


def test_each_type_is_read_from_file_and_from_text(tmp_path: Path) -> None:
    from_file = loaded(
        tmp_path,
        'log_level = "debug"\nstop_deadline_seconds = 3\n'
        '[cluster]\nseeds = ["a:1", "[::1]:2"]\n'
        '[commands]\ncross_slot_transactions = "per_slot"\n'
        '[[listeners]]\naddress = "h:5"\n[[listeners]]\naddress = "h:6"\n',
    ).settings
    from_text = load(
        environment={
            "STEADYREAD_LOG_LEVEL": "debug",
            "STEADYREAD_STOP_DEADLINE_SECONDS": "3",
            "STEADYREAD_CLUSTER__SEEDS": "a:1, [::1]:2",
            "STEADYREAD_COMMANDS__CROSS_SLOT_TRANSACTIONS": "per_slot",
            "STEADYREAD_LISTENERS__0__ADDRESS": "h:5",
            "STEADYREAD_LISTENERS__1__ADDRESS": "h:6",
        }
    ).settings
    assert from_file == from_text
    assert from_file.cluster.seeds == (Address("a", 1), Address("::1", 2))
    assert from_file.commands.cross_slot_transactions is CrossSlotTransactions.PER_SLOT
    assert isinstance(from_file.stop_deadline_seconds, float)


def test_a_list_of_addresses_replaces_all_listeners(tmp_path: Path) -> None:
    """Two listeners in the file, one on the command line: one listener."""
    text = '[[listeners]]\naddress = "h:1"\n[[listeners]]\naddress = "h:2"\n'
    result = loaded(tmp_path, text, overrides=[Override("listeners", ["h:3"], "--listen")])
    assert result.settings.listeners == (ListenerSettings(Address("h", 3)),)
    assert str(result.origin_of(("listeners", 0, "address"))) == "command line --listen"
    result = loaded(tmp_path, text, environment={"STEADYREAD_LISTENERS": "h:4,h:5,h:6"})
    assert [listener.address.port for listener in result.settings.listeners] == [4, 5, 6]


def test_hooks_are_read_from_file_and_from_text(tmp_path: Path) -> None:
    """As many as are given; none by default, and none when the environment says so."""
    (tmp_path / "secret").write_text("Bearer x\n")
    text = (
        '[[hooks]]\nname = "a"\ncommand = ["notify", "-v"]\n'
        '[[hooks]]\nname = "b"\nurl = "https://h/p"\nauthorization_file = "secret"\nevents = ["failover"]\n'
    )
    assert loaded(tmp_path, text).settings.hooks == (
        HookSettings(name="a", command=("notify", "-v")),
        HookSettings(
            name="b",
            url="https://h/p",
            authorization="Bearer x",
            authorization_file=str(tmp_path / "secret"),
            events=("failover",),
        ),
    )
    assert loaded(tmp_path, text, environment={"STEADYREAD_HOOKS": ""}).settings.hooks == ()
    variables = {"STEADYREAD_HOOKS__0__NAME": "c", "STEADYREAD_HOOKS__0__COMMAND": "notify, -q"}
    assert load(environment=variables).settings.hooks == (HookSettings(name="c", command=("notify", "-q")),)


def test_rules_are_read_from_file_and_from_text(tmp_path: Path) -> None:
    """A table within [reads]: none by default, each by its index, and a gap is named."""
    (tmp_path / "secret").write_text("s3cret\n")
    text = (
        '[reads]\nzones = ["h:1=a", "[::1]:2=b=c"]\ntoken_secret_file = "secret"\n'
        '[[reads.rules]]\nprefix = "cache:"\nlevel = "eventual"\n'
        '[[reads.rules]]\nprefix = "feed:"\nlevel = "bounded_staleness"\nmax_staleness_seconds = 2\n'
    )
    reads = loaded(tmp_path, text).settings.reads
    assert reads.rules == (
        ReadRuleSettings("cache:", "eventual"),
        ReadRuleSettings("feed:", "bounded_staleness", 2.0),
    )
    assert reads.zones == (NodeZone(Address("h", 1), "a"), NodeZone(Address("::1", 2), "b=c"))
    assert reads.token_secret == "s3cret"
    variables = {
        "STEADYREAD_READS__RULES__1__LEVEL": "session",
        "STEADYREAD_READS__RULES__2__PREFIX": "cart:",
        "STEADYREAD_READS__RULES__2__LEVEL": "strong",
        "STEADYREAD_READS__ZONES": "h:1=a,[::1]:2=b=c",
    }
    text = text.replace("max_staleness_seconds = 2\n", "")
    mixed = loaded(tmp_path, text, environment=variables)
    assert [(rule.prefix, rule.level) for rule in mixed.settings.reads.rules] == [
        ("cache:", "eventual"),
        ("feed:", "session"),
        ("cart:", "strong"),
    ]
    assert mixed.settings.reads.zones == reads.zones
    assert str(mixed.origin_of(("reads", "rules", 1, "prefix"))) == f"{tmp_path / 'steadyread.toml'}:8"
    assert loaded(tmp_path, text, environment={"STEADYREAD_READS__RULES": ""}).settings.reads.rules == ()
    replaced = {"STEADYREAD_READS__RULES": "a:", "STEADYREAD_READS__RULES__0__LEVEL": "session"}
    assert loaded(tmp_path, text, environment=replaced).settings.reads.rules == (
        ReadRuleSettings("a:", "session"),
    )
    assert problems(tmp_path, environment={"STEADYREAD_READS__RULES__1__PREFIX": "a"}) == [
        "environment STEADYREAD_READS__RULES__1__PREFIX: reads.rules[1].prefix: "
        "there is no reads.rules[0] before it"
    ]


def test_what_a_hook_gets_is_no_setting() -> None:
    """A hook's command may be this program, which must not stumble over what it was told."""
    assert load(environment=dict.fromkeys(EVENT_VARIABLES, "x")) == Loaded(Settings(), {})


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('log_level = "error"')
    assert load(environment={"STEADYREAD_CONFIG": str(file)}).settings.log_level == "error"


def test_all_problems_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    """Promise 9: a refusal says what, why and what to do."""
    text = """\
log_levl = "info"
stop_deadline_seconds = "10s"
[cluster]
seeds = ["10.0.0.1:7000",
  "10.0.0.2"]
connect_timeout_seconds = 0
request_deadline_seconds = nan
[[listeners]]
address = ":7379"
[[listeners]]
adress = "h:1"
[clients]
connections_max = true
request_bytes_max = 1.5
unsent_bytes_max = 0
seeds = ["a:1"]
[commands]
cross_slot_transactions = "perslot"
script_cache_bytes_max = 1979-05-27
[admin]
address = "::1:7380"
[client]
x = 1
"""
    environment = {
        "STEADYREAD_CLUSTER__SEED": "h:1",
        "STEADYREAD_CLIENTS__IDLE_TIMEOUT_SECONDS": "1m",
        "STEADYREAD_LISTENERS__5__ADDRESS": "h:9",
        "STEADYREAD_ADMIN": "h:9",
    }
    overrides = [
        Override("log_level", "Debug", "--set log_level"),
        Override("cluster.seeds", ["h:0"], "--seed"),
        Override("cluster.sedes", "h:1", "--set cluster.sedes"),
    ]
    assert problems(tmp_path, text, environment, overrides) == [
        'FILE:1: log_levl: unknown setting; did you mean "log_level"?',
        'FILE:2: stop_deadline_seconds = "10s": give a number of seconds, at least 0 and at most 86400',
        'FILE:5: cluster.seeds[1] = "10.0.0.2": give HOST:PORT, as in "127.0.0.1:7379"',
        "FILE:6: cluster.connect_timeout_seconds = 0: give a number of seconds, above 0 and at most 86400",
        "FILE:7: cluster.request_deadline_seconds = nan: give a number of seconds, above 0 and at most 86400",
        'FILE:9: listeners[0].address = ":7379": give a host before the colon, as in "0.0.0.0:7379"',
        'FILE:11: listeners[1].adress: unknown setting; did you mean "address"?',
        "FILE:13: clients.connections_max = true: give a whole number, at least 1",
        "FILE:14: clients.request_bytes_max = 1.5: give a whole number of bytes, at least 1",
        "FILE:15: clients.unsent_bytes_max = 0: give a whole number of bytes, at least 1",
        "FILE:16: clients.seeds: unknown setting; there is cluster.seeds",
        'FILE:18: commands.cross_slot_transactions = "perslot": '
        'give one of "refuse", "per_slot"; did you mean "per_slot"?',
        "FILE:19: commands.script_cache_bytes_max = 1979-05-27: give a whole number of bytes, at least 0",
        'FILE:21: admin.address = "::1:7380": give an IPv6 address in brackets, as in "[::1]:7380"',
        'FILE:22: client: unknown table; did you mean "clients"?',
        "environment STEADYREAD_ADMIN: admin: is a table; set one of "
        "STEADYREAD_ADMIN__ADDRESS, STEADYREAD_ADMIN__TOKEN, STEADYREAD_ADMIN__TOKEN_FILE",
        'environment STEADYREAD_CLIENTS__IDLE_TIMEOUT_SECONDS: clients.idle_timeout_seconds = "1m": '
        "give a number of seconds, at least 0",
        'environment STEADYREAD_CLUSTER__SEED: unknown setting; did you mean "STEADYREAD_CLUSTER__SEEDS"?',
        'command line --set log_level: log_level = "Debug": '
        'give one of "debug", "info", "warning", "error"; did you mean "debug"?',
        'command line --seed: cluster.seeds[0] = "h:0": give a port from 1 to 65535',
        'command line --set cluster.sedes: cluster.sedes: unknown setting; did you mean "cluster.seeds"?',
        "environment STEADYREAD_LISTENERS__5__ADDRESS: listeners[5].address: "
        "there is no listeners[4] before it",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = = 2\n", "FILE:2: is not valid TOML: "),
        ("[cluster]\n[cluster]\n", "FILE:2: is not valid TOML: "),
        ("\n\nlog_level = [1,\n", "FILE:3: is not valid TOML: "),
        (b"a = 1\nb = '\xff'\n", "FILE:2: is not UTF-8 text"),
        ("cluster = 3\n", "FILE:1: cluster: is a table; write [cluster]"),
        (
            '[listeners]\naddress = "h:1"\n',
            "FILE:1: listeners: is a list of tables; write [[listeners]]",
        ),
        ("listeners = []\n", "FILE:1: listeners: give at least one [[listeners]] table"),
        ("[cluster]\nseeds = []\n", "FILE:2: cluster.seeds = []: give at least one address"),
        (
            "[clients]\nunsent_bytes_hard_max = 10\n",
            "FILE:2: clients.unsent_bytes_hard_max = 10: "
            "give at least clients.unsent_bytes_max, which is 1048576",
        ),
        (
            '[[listeners]]\naddress = "127.0.0.1:7380"\n',
            'FILE:2: admin.address = "127.0.0.1:7380": is taken by listeners[0].address; give another',
        ),
        (
            '[admin]\naddress = "0.0.0.0:7380"\n',
            'FILE:2: admin.address = "0.0.0.0:7380": '
            "is not a loopback address, so set admin.token or admin.token_file too",
        ),
        (
            "[[users]]\npassword = 'p'\n",
            'FILE:1: users[0].name = "": give a name of 1 to 128 printable ASCII',
        ),
        (
            "[[users]]\nname = 'a b'\npassword = 'p'\n",
            'FILE:2: users[0].name = "a b": give a name of 1 to 128',
        ),
        (
            "[[users]]\nname = 'default'\npassword = 'p'\n",
            'FILE:2: users[0].name = "default": is who does not log in: its password is clients.password',
        ),
        (
            "[[users]]\nname = 'a'\npassword = 'p'\n[[users]]\nname = 'a'\npassword = 'q'\n",
            'FILE:5: users[1].name = "a": is taken by users[0].name; give another',
        ),
        (
            "[[users]]\nname = 'a'\n",
            'FILE:1: users[0].password = "": give a password here or in password_file',
        ),
        (
            "[[users]]\nname = 'a'\npassword = 'p'\npriority = 'hi'\n",
            'FILE:4: users[0].priority = "hi": give one of "", "critical", "normal", "background"',
        ),
        ("[[hooks]]\nname = 'a'\n", "FILE:1: hooks[0].command = []: give a command or a url"),
        (
            "[[hooks]]\nname = 'a'\nurl = 'http://h'\ncommand = ['x']\n",
            "FILE:3: hooks[0].url = (set): give either this or command, not both",
        ),
        ("[[hooks]]\ncommand = ['x']\n", 'FILE:1: hooks[0].name = "": give 1 to 64 lower-case letters'),
        (
            "[[hooks]]\nname = 'A b'\ncommand = ['x']\n",
            'FILE:2: hooks[0].name = "A b": give 1 to 64 lower-case letters',
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\n[[hooks]]\nname = 'a'\ncommand = ['x']\n",
            'FILE:5: hooks[1].name = "a": is taken by hooks[0].name; give another',
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\nevents = ['failovr']\n",
            'FILE:4: hooks[0].events = ["failovr"]: "failovr" is no kind of event; did you mean "failover"?',
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\nevents = []\n",
            "FILE:4: hooks[0].events = []: give at least one kind",
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\nshard = '10.0.0.1:7000'\n",
            'FILE:4: hooks[0].shard = "10.0.0.1:7000": give a node id, or at least its first 4 digits',
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x', 3]\n",
            "FILE:3: hooks[0].command[1] = 3: give a text in quotes",
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['']\n",
            'FILE:3: hooks[0].command = [""]: give a program first',
        ),
        (
            "[[hooks]]\nname = 'a'\nurl = 'ftp://h'\n",
            "FILE:3: hooks[0].url = (set): give a URL with http or https and a host",
        ),
        (
            "[[hooks]]\nname = 'a'\nurl = 'http://h:x'\n",
            "FILE:3: hooks[0].url = (set): give a URL, as in",
        ),
        (
            "[[hooks]]\nname = 'a'\nurl = 'http://h/#x'\n",
            "FILE:3: hooks[0].url = (set): give printable ASCII without spaces and fragment",
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\nauthorization = 'Bearer x'\n",
            "FILE:4: hooks[0].authorization = (set): goes with a url",
        ),
        (
            "[[hooks]]\nname = 'a'\nurl = 'http://h'\nauthorization = 'Bearer x '\n",
            "FILE:4: hooks[0].authorization = (set): give printable ASCII",
        ),
        (
            "[[hooks]]\nname = 'a'\ncommand = ['x']\nretry_first_seconds = 90\n",
            "FILE:4: hooks[0].retry_max_seconds = 60.0: give at least retry_first_seconds, which is 90",
        ),
        (
            "[[listeners]]\nlevel = 'caughtup'\n",
            'FILE:2: listeners[0].level = "caughtup": give one of "auto", "strong", "caught_up", '
            '"bounded_staleness", "session", "snapshot", "eventual"; did you mean "caught_up"?',
        ),
        (
            "[[listeners]]\nlevel = 'session'\nmax_staleness_seconds = 2\n",
            "FILE:3: listeners[0].max_staleness_seconds = 2.0: "
            'goes with level "bounded_staleness" only, and the level here is "session"',
        ),
        (
            "[reads]\nzones = ['h:1=a',\n'h:2']\n",
            'FILE:3: reads.zones[1] = "h:2": give HOST:PORT=ZONE, as in "10.0.0.1:6379=eu-west-1a"',
        ),
        ("[reads]\nzones = ['h=a']\n", 'FILE:2: reads.zones[0] = "h=a": give HOST:PORT, as in'),
        ("[reads]\nzones = ['h:0=a']\n", 'FILE:2: reads.zones[0] = "h:0=a": give a port from 1 to 65535'),
        ("[reads]\nzones = ['h:1= ']\n", 'FILE:2: reads.zones[0] = "h:1= ": give HOST:PORT=ZONE'),
        ("[reads]\nzones = 'h:1=a'\n", 'FILE:2: reads.zones = "h:1=a": give a list of "HOST:PORT=ZONE"'),
        (
            "[reads]\nzones = ['h:1=a', 'h:1=b']\n",
            'FILE:2: reads.zones[1] = "h:1=b": has its zone from reads.zones[0]; give each node once',
        ),
        (
            "[reads.rules]\nlevel = 'strong'\n",
            "FILE:1: reads.rules: is a list of tables; write [[reads.rules]]",
        ),
        ("[[reads.rule]]\nlevel = 'strong'\n", 'FILE:1: reads.rule: unknown setting; did you mean "rules"?'),
        (
            "[[reads.rules]]\nlevel = 'strong'\n",
            'FILE:1: reads.rules[0].prefix = "": give how the keys begin',
        ),
        (
            "[reads]\nzone = 'a'\n[[reads.rules]]\nprefix = 'a'\nlevel = 'strong'\n[[reads.rules]]\nprefix = 'b'\n",
            'FILE:6: reads.rules[1].level = "": give the level that reads of these keys get',
        ),
        (
            "[[reads.rules]]\nprefix = 'a'\nlevel = 'auto'\n",
            'FILE:3: reads.rules[0].level = "auto": give one of "strong", "caught_up", "bounded_staleness", ',
        ),
        (
            "[[reads.rules]]\nprefix = 'a'\nlevel = 'snapshot'\nmax_staleness_seconds = 3\n",
            'FILE:3: reads.rules[0].level = "snapshot": a connection\'s reads are of one snapshot or of none, so a '
            'listener or the routing mode gives it, and no rule; give one of "strong", "caught_up", ',
        ),
        (
            "[[reads.rules]]\nprefix = 'a'\nlevel = 'strong'\nmax_staleness_seconds = 3\n",
            "FILE:4: reads.rules[0].max_staleness_seconds = 3.0: "
            'goes with level "bounded_staleness" only, and the level here is "strong"',
        ),
        (
            "[[reads.rules]]\nprefix = 'a'\nlevel = 'bounded_staleness'\nmax_staleness_seconds = -1\n",
            "FILE:4: reads.rules[0].max_staleness_seconds = -1: give a number of seconds, at least 0",
        ),
        (
            "[[reads.rules]]\nprefix = 'a'\nlevel = 'strong'\n[[reads.rules]]\nprefix = 'a'\nlevel = 'session'\n",
            'FILE:5: reads.rules[1].prefix = "a": is taken by reads.rules[0].prefix; give another',
        ),
        (
            "[snapshots]\non_budget = 'warm'\n",
            'FILE:2: snapshots.on_budget = "warm": give one of "abort", "warn"; did you mean "warn"?',
        ),
        (
            "[snapshots]\nttl_seconds = 31_536_001\n",
            "FILE:2: snapshots.ttl_seconds = 31536001: give a number of seconds, at least 0 and at most 31536000",
        ),
        (
            "[snapshots]\nopen_deadline_seconds = 1\ndrain_seconds = 1.5\n",
            "FILE:3: snapshots.drain_seconds = 1.5: give at most snapshots.open_deadline_seconds, which is 1",
        ),
        (
            "[snapshots]\nmember_ttl_seconds = 1\nhold_seconds = 1\n",
            "FILE:3: snapshots.hold_seconds = 1.0: give less than snapshots.member_ttl_seconds, which is 1",
        ),
        (
            "[snapshots]\nage_seconds_max = 60\n",
            "FILE:2: snapshots.ttl_seconds = 3600.0: give at most snapshots.age_seconds_max, which is 60",
        ),
        (
            '[admin]\ntoken = "a b"\n',
            "FILE:2: admin.token = (set): give printable ASCII without spaces, as HTTP headers carry it",
        ),
    ],
)
def test_a_single_problem(tmp_path: Path, text: str | bytes, expected: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(expected)


DEFAULT_TEXT = toml_of(load())


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(DEFAULT_TEXT)), st.integers(0, 20), st.text('"[]{}=#.,\n\\ab1') | st.text()
        )
    )
)
def test_whatever_the_file_holds_its_problems_have_lines(edits: list[tuple[int, int, str]]) -> None:
    """Edited anywhere, a file is loaded or refused with lines; nothing else is raised."""
    text = DEFAULT_TEXT
    for at, removed, added in edits:
        text = text[:at] + added + text[at + removed :]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "edited.toml")
        file.write_bytes(text.encode())
        for problem in problems_of(file=file):
            assert problem.origin.line is not None
            assert problem.origin.line <= text.count("\n") + 1


@given(st.dictionaries(st.sampled_from(VARIABLES), st.text()))
def test_whatever_the_environment_holds_its_problems_name_the_variable(environment: dict[str, str]) -> None:
    for problem in problems_of(environment=environment):
        assert problem.origin.name in environment


def problems_of(**sources: object) -> tuple[Problem, ...]:
    """What is wrong with these sources; nothing if they load."""
    try:
        load(**sources)  # type: ignore[arg-type]  # the caller names the parameters of load
    except SettingsError as error:
        return error.problems or (Problem(Origin(), "", None, "an error without a problem"),)
    return ()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        load(file=tmp_path / "none.toml")
    assert str(raised.value) == f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert load(overrides=[Override("admin.address", f"{host}:1", "--admin")]).settings.admin.token == ""


@pytest.mark.parametrize(
    "text",
    [
        '[cluster]\npasword = "hunter2"',
        '[cluster]\npassword = ["hunter2"]',
        '[cluster]\npassword = { is = "hunter2" }',
        '[cluster]\nseeds = ["redis://me:hunter2@h:1"]',
        '[cluster]\nurl = "redis://me:hunter2@h:1"',
        '[admin]\nauth = "hunter2"',
        '[admin]\nsekret = "hunter2"',
        '[admin]\ntoken = "hunter2 "',
        '[[hooks]]\nname = "a"\nurl = "http://me:hunter2@h/"',
        '[[hooks]]\nname = "a"\nurl = "http://h/"\nauthorization = "hunter2 "',
        '[[hooks]]\nname = "a"\nurl = "http://h/"\nauthorization = ["hunter2"]',
        'passwords = ["hunter2"]',
        '[users]\npassword = "hunter2"',
        '[reads]\ntoken_secret = ["hunter2"]',
        'cluster = [{ password = "hunter2" }]',
        'cluster = "redis://me:hunter2@h:1"',
    ],
)
def test_a_message_never_holds_a_secret(tmp_path: Path, text: str) -> None:
    assert "hunter2" not in "\n".join(problems(tmp_path, text))


def test_secrets_may_stand_in_files(tmp_path: Path) -> None:
    """Relative to the settings file; the stronger source wins over the weaker one's other form."""
    (tmp_path / "secret").write_text("hunter2\n")
    text = '[cluster]\npassword_file = "secret"\n'
    cluster = loaded(tmp_path, text).settings.cluster
    assert (cluster.password, cluster.password_file) == ("hunter2", str(tmp_path / "secret"))
    by_variable = loaded(
        tmp_path, text, environment={"STEADYREAD_CLUSTER__PASSWORD": "other"}
    ).settings.cluster
    assert (by_variable.password, by_variable.password_file) == ("other", "")
    by_file = load(
        environment={"STEADYREAD_CLUSTER__PASSWORD": "other"},
        overrides=[Override("cluster.password_file", str(tmp_path / "secret"), "--set")],
    ).settings.cluster
    assert by_file.password == "hunter2"


def test_what_can_be_wrong_with_a_secret_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "large").write_bytes(b"x" * 65_537)
    text = (
        '[cluster]\npassword = "a"\npassword_file = "b"\n[clients]\npassword_file = "none"\n'
        '[admin]\naddress = "h:1"\ntoken_file = "empty"\n'
    )
    assert problems(tmp_path, text) == [
        "FILE:3: cluster.password_file: give either this or cluster.password, not both",
        f'FILE:5: clients.password_file = "{tmp_path}/none": cannot be read: No such file or directory',
        f'FILE:8: admin.token_file = "{tmp_path}/empty": is empty',
    ]
    found = problems(tmp_path, '[admin]\ntoken_file = "large"\n')
    assert found == [f'FILE:2: admin.token_file = "{tmp_path}/large": is larger than 65536 bytes']


def test_what_kubernetes_sets_for_a_service_called_steadyread_is_passed_over() -> None:
    environment = {
        "STEADYREAD_SERVICE_HOST": "10.0.0.1",
        "STEADYREAD_SERVICE_PORT_REDIS": "7379",
        "STEADYREAD_PORT": "tcp://10.0.0.1:7379",
        "STEADYREAD_ADMIN_PORT_7380_TCP_ADDR": "10.0.0.1",
    }
    assert load(environment=environment) == Loaded(Settings(), {})
    with pytest.raises(SettingsError):
        load(environment={"STEADYREAD_PORT": "7379"})
