"""The settings as frozen values. Units stand last in each name.

Each field is ``Annotated`` with a ``Says``: what its value means, and the limits that a value must keep. The
loader checks the limits and ``config show`` prints the meaning, so an option is described once, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, NamedTuple

from routing.levels import AUTO, Level
from routing.priority import Priority
from routing.slot import SLOT_COUNT
from routing.topology import Address


@dataclass(frozen=True, slots=True)
class Says:
    """What a setting means, and which values of its type are allowed."""

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()  # of a text; () means any text
    not_offered: tuple[
        tuple[str, str], ...
    ] = ()  # what people may expect among the choices, and why it is not
    is_secret: bool = False  # never printed
    is_dialled: bool = False  # of addresses: connected to, so port 0 names nothing
    is_live: bool = False  # a reload changes it while the proxy runs; the others need a restart


class CrossSlotTransactions(Enum):
    REFUSE = "refuse"
    PER_SLOT = "per_slot"


LOG_LEVELS = ("debug", "info", "warning", "error")
DAY_SECONDS = 86_400.0
RATE_MAX = 1e9  # requests per second: above it no limit limits anything
SNAPSHOT_SECONDS_MAX = 365 * DAY_SECONDS  # of a TTL
DEFAULT_LISTENER_ADDRESS = Address("127.0.0.1", 7379)
DEFAULT_ADMIN_ADDRESS = Address("127.0.0.1", 7380)
DEFAULT_SEEDS = (Address("127.0.0.1", 7600),)
OFFERED_LEVELS = tuple(level.value for level in Level)
RULE_LEVELS = tuple(level for level in OFFERED_LEVELS if level != Level.SNAPSHOT.value)
PRIORITIES = tuple(map(str, Priority))
NO_SNAPSHOT_BY_RULE = (
    Level.SNAPSHOT.value,
    "a connection's reads are of one snapshot or of none, so a listener or the routing mode gives it, and no rule",
)
EVENT_VARIABLES = (
    "STEADYREAD_EVENT_KIND",
    "STEADYREAD_EVENT_NUMBER",
)  # what a hook's command gets; no settings


class NodeZone(NamedTuple):
    """The availability zone of the node that listens at ``address``."""

    address: Address
    zone: str

    def __str__(self) -> str:
        return f"{self.address}={self.zone}"


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """One port that services connect to. Repeat the table for each further port."""

    address: Annotated[
        Address,
        Says(
            'Where to listen: "127.0.0.1:7379" for this machine alone, "0.0.0.0:7379" or "[::]:7379" for all.'
        ),
    ] = DEFAULT_LISTENER_ADDRESS
    level: Annotated[
        str,
        Says(
            "The consistency level of reads that come here, where neither their connection nor a rule for their "
            'key names one. "auto" means that the routing mode decides. "snapshot" is the current one at each read, '
            "and holds for keys that a rule names too.",
            choices=(AUTO, *OFFERED_LEVELS),
        ),
    ] = AUTO
    max_staleness_seconds: Annotated[
        float,
        Says(
            "With level bounded_staleness: how old the data may be. 0 means as old as [reads] says.",
            at_least=0,
            at_most=DAY_SECONDS,
        ),
    ] = 0.0
    priority: Annotated[
        str,
        Says(
            "The priority of what comes here, where neither its connection nor a rule for its key names one: "
            "who gets an overloaded node's time first.",
            choices=PRIORITIES,
        ),
    ] = str(Priority.NORMAL)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """The cluster behind the proxy."""

    seeds: Annotated[
        tuple[Address, ...],
        Says(
            "The nodes to ask first. One that answers is enough: the others are discovered from it.",
            is_dialled=True,
        ),
    ] = DEFAULT_SEEDS
    username: Annotated[str, Says('The ACL user to be at the nodes. "" means the default user.')] = ""
    password: Annotated[
        str, Says('The password for the nodes. "" means that the nodes ask for none.', is_secret=True)
    ] = ""
    password_file: Annotated[
        str, Says('A file that holds the password, instead of `password`. "" means none.')
    ] = ""
    connect_timeout_seconds: Annotated[
        float,
        Says(
            "A node that has not accepted a connection after this time counts as unreachable.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 1.0
    request_deadline_seconds: Annotated[
        float,
        Says(
            "One request may take this long, all retries and redirections included; "
            "then its client gets an error.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 5.0
    refresh_interval_seconds: Annotated[
        float,
        Says(
            "Time between two looks at the cluster while nothing happens. A redirection causes one at once.",
            above=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 0.5
    migration_stuck_seconds: Annotated[
        float,
        Says(
            "A migration in which for this long no slot changed hands and no key moved is called stuck.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 30.0
    unsent_bytes_max: Annotated[
        int,
        Says(
            "Bytes kept for one node that cannot be sent yet; past them, clients that use it are held back.",
            at_least=1,
        ),
    ] = 64 * 1024 * 1024
    private_connections_max: Annotated[
        int,
        Says(
            "Connections to one node that serve a single client each: blocking commands, WATCH, "
            "subscriptions. 0 means that such commands are refused.",
            at_least=0,
        ),
    ] = 1000


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Limits on each client connection.

    After a reload, `connections_max`, `idle_timeout_seconds` and the password hold at once; who is logged in stays
    so. The others hold for connections made from then on, and the older ones keep theirs.
    """

    password: Annotated[
        str,
        Says(
            'The password that clients must give with AUTH. "" means that they need not authenticate.',
            is_secret=True,
            is_live=True,
        ),
    ] = ""
    password_file: Annotated[
        str, Says('A file that holds the password, instead of `password`. "" means none.', is_live=True)
    ] = ""
    connections_max: Annotated[
        int,
        Says(
            "Client connections at one time, over all listeners; more are refused.", at_least=1, is_live=True
        ),
    ] = 20_000
    open_requests_max: Annotated[
        int,
        Says(
            "Unanswered requests of one client; past them it is not read until half are answered.",
            at_least=1,
            is_live=True,
        ),
    ] = 1024
    unsent_bytes_max: Annotated[
        int,
        Says(
            "Reply bytes kept for one client; past them it is not read until half of them are sent.",
            at_least=1,
            is_live=True,
        ),
    ] = 1024 * 1024
    unsent_bytes_hard_max: Annotated[
        int, Says("Reply bytes kept for one client; past them it is disconnected.", at_least=1, is_live=True)
    ] = 256 * 1024 * 1024
    request_bytes_max: Annotated[
        int, Says("Bytes of one whole request; a larger one is refused.", at_least=1, is_live=True)
    ] = 64 * 1024 * 1024
    requests_per_second: Annotated[
        float,
        Says(
            "Requests of one connection; what it sends above this rate waits its time, unread. 0 means no limit.",
            at_least=0,
            at_most=RATE_MAX,
            is_live=True,
        ),
    ] = 0.0
    requests_burst: Annotated[
        int,
        Says(
            "So many requests of a connection that was quiet go at once. 0 means those of one second.",
            at_least=0,
            at_most=RATE_MAX,
            is_live=True,
        ),
    ] = 0
    idle_timeout_seconds: Annotated[
        float,
        Says(
            "A client that sends nothing for this long is disconnected. 0 means never.",
            at_least=0,
            is_live=True,
        ),
    ] = 0.0


@dataclass(frozen=True, slots=True)
class UserSettings:
    """A user that clients can be with AUTH, and the limits on all its connections together.

    Who does not say is the user "default", whose password is that of [clients]. After a reload, the limits and the
    priority hold at once, and the password for who logs in from then on. Repeat the table for each further user.
    """

    name: Annotated[
        str,
        Says("What the user is called in AUTH, CLIENT LIST and metrics. It has no spaces.", is_live=True),
    ] = ""
    password: Annotated[
        str, Says("The password that clients must give for it.", is_secret=True, is_live=True)
    ] = ""
    password_file: Annotated[
        str, Says('A file that holds the password, instead of `password`. "" means none.', is_live=True)
    ] = ""
    priority: Annotated[
        str,
        Says(
            "The priority of what it sends, instead of that of the listener: critical, normal or background. "
            '"" means that of the listener.',
            choices=("", *PRIORITIES),
            is_live=True,
        ),
    ] = ""
    requests_per_second: Annotated[
        float,
        Says(
            "Requests of the user; what it sends above this rate waits its time, unread. 0 means no limit.",
            at_least=0,
            at_most=RATE_MAX,
            is_live=True,
        ),
    ] = 0.0
    requests_burst: Annotated[
        int,
        Says(
            "So many requests of a user that was quiet go at once. 0 means those of one second.",
            at_least=0,
            at_most=RATE_MAX,
            is_live=True,
        ),
    ] = 0
    in_flight_max: Annotated[
        int,
        Says(
            "Unanswered requests of the user; above them its connections take turns. Blocking commands do not count. "
            "0 means no limit.",
            at_least=0,
            is_live=True,
        ),
    ] = 0


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """How commands that a cluster cannot run as they are get treated."""

    cross_slot_transactions: Annotated[
        CrossSlotTransactions,
        Says(
            'A MULTI over keys of several slots: "refuse" answers an error; "per_slot" runs one '
            "transaction per slot, in order, so the whole is not atomic.",
            is_live=True,
        ),
    ] = CrossSlotTransactions.REFUSE
    script_cache_bytes_max: Annotated[
        int,
        Says(
            "Bytes of the proxy's own copies of scripts, which heal NOSCRIPT after a failover. "
            "0 means to keep none.",
            at_least=0,
        ),
    ] = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ReadRuleSettings:
    """A consistency level for keys by how they begin, where a read's connection names none.

    Of several rules that fit a key, the one with the longest prefix counts. Repeat the table for each further rule.
    """

    prefix: Annotated[
        str,
        Says(
            "How the keys begin, in UTF-8. A hash tag is a part of the key like any other.",
            is_live=True,
        ),
    ] = ""
    level: Annotated[
        str,
        Says(
            f"The level of reads of these keys: {', '.join(RULE_LEVELS)}.",
            choices=RULE_LEVELS,
            not_offered=(NO_SNAPSHOT_BY_RULE,),
            is_live=True,
        ),
    ] = ""
    max_staleness_seconds: Annotated[
        float,
        Says(
            "With level bounded_staleness: how old the data may be. 0 means as old as [reads] says.",
            at_least=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 0.0


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """Reads at replicas: what they must prove, which replicas are asked, and when one is not trusted."""

    max_staleness_seconds: Annotated[
        float,
        Says(
            "How old the data of level bounded_staleness may be, where the routing mode, a listener or a rule "
            "chose that level and names no bound.",
            above=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 1.0
    settle_seconds: Annotated[
        float,
        Says(
            "A slot that changed its owner is read at primaries only, for this long after.",
            at_least=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 5.0
    replica_timeout_seconds: Annotated[
        float,
        Says(
            "A replica that has not replied after this time is left, and the primary gets its reads.",
            above=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 0.5
    circuit_stall_seconds: Annotated[
        float,
        Says(
            "A replica that owes replies and has sent nothing for this time gets no reads that another node can "
            "answer, until it has answered a question; then it gets a growing share of them. 0 means that only "
            "replica_timeout_seconds counts.",
            at_least=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 0.1
    sample_interval_seconds: Annotated[
        float,
        Says(
            "Time between two questions to each node for its replication offset. The shorter it is, the fresher "
            "a read of bounded_staleness can be proved to be.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 0.1
    verify_interval_seconds: Annotated[
        float,
        Says(
            "Time between two comparisons of a replica's keys with its primary's. 0 means only when it joins.",
            at_least=0,
            at_most=DAY_SECONDS,
        ),
    ] = 30.0
    verify_keys: Annotated[
        int, Says("Keys drawn for one comparison of a replica with its primary.", at_least=1, at_most=1000)
    ] = 16
    quarantine_seconds: Annotated[
        float,
        Says(
            "A replica with a key that differs from its primary's is not read for this long; then it has to "
            "be verified again.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 60.0
    zone: Annotated[
        str,
        Says(
            'The availability zone that this proxy is in: replicas there are preferred. "" means no preference.',
            is_live=True,
        ),
    ] = ""
    zones: Annotated[
        tuple[NodeZone, ...],
        Says(
            'The availability zones of nodes that do not tell theirs: ["10.0.0.1:6379=a", "10.0.0.2:6379=b"]. '
            "What is said here counts more than what a node tells.",
            is_dialled=True,
            is_live=True,
        ),
    ] = ()
    token_secret: Annotated[
        str,
        Says(
            "What session tokens are signed with, the same at all proxies of a cluster. "
            '"" means the password of the cluster or, where it has none, a secret that the topology store keeps.',
            is_secret=True,
        ),
    ] = ""
    token_secret_file: Annotated[
        str, Says('A file that holds it, instead of `token_secret`. "" means none.')
    ] = ""
    rules: tuple[ReadRuleSettings, ...] = ()


class OnPreserveFailure(Enum):
    """What happens when a pre-image cannot be stored."""

    ABORT = "abort"  # every open snapshot ends, and the write goes on
    REFUSE = "refuse"  # the write is refused, and the snapshots live on


class ReadAt(Enum):
    """Which nodes serve reads at snapshots."""

    OWNERS = "owners"
    REPLICAS = "replicas"


class OnBudget(Enum):
    """What happens to a snapshot that is over its budget."""

    ABORT = "abort"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class SnapshotSettings:
    """Snapshots: how they open, what they may cost, and what happens when they cost more."""

    open_max: Annotated[
        int, Says("Snapshots open at the same time, in the whole cluster.", at_least=1, at_most=64)
    ] = 8
    open_deadline_seconds: Annotated[
        float,
        Says(
            "An opening that has not succeeded after this time, all its attempts together, is given up.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 5.0
    drain_seconds: Annotated[
        float,
        Says(
            "How long one attempt waits for the answers to the writes that were sent before its cut.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 1.0
    hold_seconds: Annotated[
        float,
        Says(
            "With several proxies: the longest time for which new writes are held while all of them cut.",
            above=0,
            at_most=60,
        ),
    ] = 0.25
    member_ttl_seconds: Annotated[
        float,
        Says(
            "With several proxies: one that the store has not heard from for this long counts as gone.",
            at_least=0.5,
            at_most=3600,
        ),
    ] = 5.0
    ttl_seconds: Annotated[
        float,
        Says(
            "A snapshot opened without a TTL is closed after this time. 0 means that it stays until it is closed.",
            at_least=0,
            at_most=SNAPSHOT_SECONDS_MAX,
        ),
    ] = 3600.0
    age_seconds_max: Annotated[
        float,
        Says(
            "A snapshot older than this is over its budget. 0 means no limit.",
            at_least=0,
            at_most=SNAPSHOT_SECONDS_MAX,
        ),
    ] = 86400.0
    preserved_bytes_max: Annotated[
        int,
        Says(
            "Bytes of pre-images that this proxy's writes may store for one snapshot; more is over its budget. "
            "0 means no limit.",
            at_least=0,
        ),
    ] = 1024 * 1024 * 1024
    read_at: Annotated[
        ReadAt,
        Says(
            "Which nodes serve reads at snapshots: owners, or replicas where they can prove it, of keys that were not "
            "written since, while this proxy is the only one."
        ),
    ] = ReadAt.OWNERS
    on_budget: Annotated[
        OnBudget, Says("What happens to a snapshot that is over its budget: abort or warn.")
    ] = OnBudget.ABORT
    on_preserve_failure: Annotated[
        OnPreserveFailure,
        Says(
            "When a pre-image cannot be stored: abort ends the open snapshots and lets the write go on, refuse "
            "refuses the write."
        ),
    ] = OnPreserveFailure.ABORT
    key_bytes_max: Annotated[
        int,
        Says(
            "A key whose memory is more than this is not copied: reads of it at the snapshot are refused. "
            "0 means no limit.",
            at_least=0,
        ),
    ] = 64 * 1024 * 1024
    known_keys_max: Annotated[
        int,
        Says(
            "Keys that one node connection remembers as preserved; past it they are forgotten and asked for again. "
            "Of so many, too, a proxy knows without asking whether they were written since a cut.",
            at_least=1000,
        ),
    ] = 200_000
    memory_percent_max: Annotated[
        int,
        Says(
            "No snapshot is opened while a server uses more than this part of its maxmemory.",
            at_least=1,
            at_most=100,
        ),
    ] = 90
    sweep_pause_seconds: Annotated[
        float,
        Says(
            "Pause between two steps of a sweep, each of a thousand keys of one node.",
            at_least=0,
            at_most=60,
        ),
    ] = 0.01
    sweep_interval_seconds: Annotated[
        float,
        Says(
            "Time between two looks for what crashed proxies left in the cluster.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 600.0
    bypass_interval_seconds: Annotated[
        float,
        Says(
            "While a snapshot is open: time between two looks for clients that write past the proxies.",
            above=0,
            at_most=DAY_SECONDS,
        ),
    ] = 2.0


@dataclass(frozen=True, slots=True)
class HotSettings:
    """Hot keys and slots: how they are looked for, by looking at a few of all commands."""

    sample_every: Annotated[
        int,
        Says(
            "Of so many commands one is looked at, chosen at random. 1 means all, 0 means none.",
            at_least=0,
            at_most=1_000_000,
            is_live=True,
        ),
    ] = 256
    window_seconds: Annotated[
        float,
        Says(
            "What is shown was seen in this time or the same time before it; all before is forgotten.",
            at_least=1,
            at_most=3600,
            is_live=True,
        ),
    ] = 30.0
    counters: Annotated[
        int,
        Says(
            "Keys, and slots, counted at the same time. All that make up more than 1 part in this number are found.",
            at_least=16,
            at_most=1000,
            is_live=True,
        ),
    ] = 256


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What GET has read at snapshots, kept in this process, and in a memcached."""

    bytes_max: Annotated[
        int,
        Says(
            "Memory for it, keys and tables included; what was not read for longest goes first. "
            "0 means that nothing is kept in this process.",
            at_least=0,
        ),
    ] = 0
    value_bytes_max: Annotated[int, Says("A larger value, its key included, is not kept.", at_least=1)] = (
        64 * 1024
    )
    memcached: Annotated[
        str,
        Says(
            'A memcached, as "HOST:PORT", that keeps them too, for all proxies that name it. "" means none. '
            "Whoever can write to it can change what reads at snapshots say."
        ),
    ] = ""
    memcached_timeout_ms: Annotated[
        float,
        Says(
            "A read waits no longer for memcached; it goes to its node then, and so do all others until memcached "
            "answers again.",
            above=0,
            at_most=1000,
        ),
    ] = 10.0


@dataclass(frozen=True, slots=True)
class PriorityRuleSettings:
    """A priority for keys by how they begin, where the connection asked for none.

    A command's first key counts, and of several rules that fit, the one with the longest prefix. Repeat the table for
    each further rule.
    """

    prefix: Annotated[
        str, Says("How the keys begin, in UTF-8. A hash tag is a part of the key like any other.")
    ] = ""
    priority: Annotated[
        str,
        Says(f"The priority of commands on these keys: {', '.join(PRIORITIES)}.", choices=PRIORITIES),
    ] = ""


@dataclass(frozen=True, slots=True)
class OverloadSettings:
    """What nodes are asked at once, and who waits or is refused when that is too much for one."""

    adaptive: Annotated[
        bool,
        Says(
            "Whether each node has a limit of requests at once, which follows its round-trip times. What does not "
            "fit waits, the more important first, and is refused with OVERLOADED when it has waited too long."
        ),
    ] = True
    limit_min: Annotated[int, Says("The least such limit.", at_least=1)] = 4
    limit_max: Annotated[int, Says("The greatest. A node at which nothing queues has none.", at_least=1)] = (
        1024
    )
    slack_ms: Annotated[
        float,
        Says(
            "Requests that queue at a node for less than this are no reason to lower its limit.",
            at_least=0,
            at_most=1000,
        ),
    ] = 1.0
    wait_critical_ms: Annotated[
        float,
        Says(
            "So long a critical request may wait for an overloaded node, and any request for one that answers nothing.",
            at_least=1,
            at_most=DAY_SECONDS * 1000,
        ),
    ] = 5000.0
    wait_normal_ms: Annotated[
        float, Says("The same for a normal request, while the node answers.", at_least=0, at_most=10_000)
    ] = 100.0
    wait_background_ms: Annotated[
        float, Says("The same for a background request.", at_least=0, at_most=10_000)
    ] = 5.0
    waiting_max: Annotated[
        int,
        Says("Requests that wait for one node; when it is one more, the least important goes.", at_least=1),
    ] = 1024
    migration_factor: Annotated[
        float,
        Says(
            "While a migration touches a node, its limit is this part of what its round trips allow, and that of "
            "background requests this part of that. 1 means that a migration changes nothing.",
            at_least=0.01,
            at_most=1,
        ),
    ] = 0.5
    rules: tuple[PriorityRuleSettings, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The topology store: the record of the shard map, its changes, and what operators did."""

    file: Annotated[
        str,
        Says(
            "The SQLite file. Proxies of one cluster on one machine share it, and one of them looks at the cluster "
            'for all. "memory" means that the record ends with the process. "" means a file named after the admin '
            "port, in $XDG_STATE_HOME/steadyread or ~/.local/state/steadyread; or memory when that port is 0."
        ),
    ] = ""
    events_kept_max: Annotated[int, Says("Events kept; the oldest go first.", at_least=1000)] = 1_000_000
    views_kept_max: Annotated[
        int, Says("Versions of the shard map kept; the oldest go first.", at_least=10)
    ] = 10_000


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """The admin port: health, metrics, topology."""

    address: Annotated[Address, Says("Where the admin port listens.")] = DEFAULT_ADMIN_ADDRESS
    token: Annotated[
        str,
        Says(
            "What a caller must send as `Authorization: Bearer TOKEN`, /healthz aside. "
            "Required when the address is not a loopback address.",
            is_secret=True,
        ),
    ] = ""
    token_file: Annotated[str, Says('A file that holds the token, instead of `token`. "" means none.')] = ""


@dataclass(frozen=True, slots=True)
class HookSettings:
    """A command or a URL that is told of events. Repeat the table for each further hook."""

    name: Annotated[
        str,
        Says(
            "What the hook is called, for good: lower-case letters, digits, - and _. Its position hangs on it."
        ),
    ] = ""
    events: Annotated[
        tuple[str, ...],
        Says('The kinds of events, as shell patterns: ["failover", "migration_*"]. ["*"] means all.'),
    ] = ("*",)
    shard: Annotated[
        str,
        Says(
            "Only events that concern the node with this id, or the shard whose primary it is; the beginning "
            'of the id is enough. "" means any.'
        ),
    ] = ""
    slot: Annotated[
        int, Says("Only events that concern this slot. -1 means any.", at_least=-1, at_most=SLOT_COUNT - 1)
    ] = -1
    command: Annotated[
        tuple[str, ...],
        Says(
            "The program and its arguments, no shell. It gets the event as JSON on standard input, and "
            f"{' and '.join(EVENT_VARIABLES)}; exit code 0 means that it was delivered."
        ),
    ] = ()
    url: Annotated[
        str,
        Says(
            "Instead of a command: where to POST the event as JSON. An answer of 2xx means that it was "
            "delivered. It is shown: a secret belongs into `authorization_file`."
        ),
    ] = ""
    authorization: Annotated[
        str,
        Says('The Authorization header of each POST, as in "Bearer TOKEN". "" means none.', is_secret=True),
    ] = ""
    authorization_file: Annotated[
        str, Says('A file that holds the header\'s value, instead of `authorization`. "" means none.')
    ] = ""
    timeout_seconds: Annotated[
        float,
        Says("One attempt may take this long; then it has failed.", above=0, at_most=DAY_SECONDS),
    ] = 10.0
    attempts_max: Annotated[
        int,
        Says("Attempts for one event; then it becomes a dead letter, and the next is its turn.", at_least=1),
    ] = 8
    retry_first_seconds: Annotated[
        float,
        Says("The wait after the first failed attempt; it doubles with each.", above=0, at_most=DAY_SECONDS),
    ] = 1.0
    retry_max_seconds: Annotated[
        float, Says("The longest wait between two attempts.", above=0, at_most=DAY_SECONDS)
    ] = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them."""

    log_level: Annotated[
        str,
        Says(
            "The least serious messages that are logged, on standard error.", choices=LOG_LEVELS, is_live=True
        ),
    ] = "info"
    stop_deadline_seconds: Annotated[
        float,
        Says(
            "After SIGTERM, what is in flight may take this long to finish; then it is cut off.",
            at_least=0,
            at_most=DAY_SECONDS,
            is_live=True,
        ),
    ] = 10.0
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    listeners: tuple[ListenerSettings, ...] = field(default_factory=lambda: (ListenerSettings(),))
    clients: ClientSettings = field(default_factory=ClientSettings)
    users: tuple[UserSettings, ...] = ()
    commands: CommandSettings = field(default_factory=CommandSettings)
    reads: ReadSettings = field(default_factory=ReadSettings)
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    hot: HotSettings = field(default_factory=HotSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    overload: OverloadSettings = field(default_factory=OverloadSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    store: StoreSettings = field(default_factory=StoreSettings)

    hooks: tuple[HookSettings, ...] = ()
