"""Makes the settings from the command line, the environment and a TOML file, and keeps where each came from.

Precedence: command line over environment over file over default, option by option. Every value that was given
is checked, also one that a stronger source replaces, and all problems are reported together.

The environment variable of an option is its path in capitals with two underscores between its parts:
``STEADYREAD_CLUSTER__SEEDS="10.0.0.1:7000,10.0.0.2:7000"``, ``STEADYREAD_LISTENERS__0__ADDRESS``,
``STEADYREAD_READS__RULES__0__PREFIX``. A list is written with commas. A list of addresses for ``listeners`` itself
(``STEADYREAD_LISTENERS``) replaces all. ``STEADYREAD_CONFIG`` names the file. What Kubernetes puts into the
environment for a service that is called steadyread (``STEADYREAD_SERVICE_HOST``, ``STEADYREAD_PORT``, ...) is not a
setting and is passed over, like what the proxy itself tells a hook's command.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from enum import IntEnum
from pathlib import Path as FilePath

from proxy.settings.cache import cache_faults
from proxy.settings.hooks import hook_faults
from proxy.settings.overload import overload_faults
from proxy.settings.positions import Path, lines_of
from proxy.settings.reads import read_faults
from proxy.settings.schema import (
    ENVIRONMENT_PREFIX,
    Option,
    Table,
    WrongElementError,
    did_you_mean,
    dotted,
    table_of,
    variable_of,
)
from proxy.settings.snapshots import snapshot_faults
from proxy.settings.users import user_faults
from proxy.settings.values import EVENT_VARIABLES, Settings
from routing.topology import Address

CONFIG_VARIABLE = "STEADYREAD_CONFIG"
SECRET_SHOWN = "(set)"
SHOWN_CHARACTERS_MAX = 80  # of a wrong value, in a message
SECRET_BYTES_MAX = 65_536  # of a password or token file: a larger one is a slip
_KUBERNETES_VARIABLE = re.compile(
    r"STEADYREAD_(?:[A-Z0-9_]+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)"
)
_KUBERNETES_PORT_VARIABLE = re.compile(r"STEADYREAD_(?:[A-Z0-9_]+_)?PORT")  # then the value is tcp://...


class Source(IntEnum):
    """Where a value came from; the greater one wins."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    COMMAND_LINE = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """The place of one value: a line of a file, a variable, a flag, or the default."""

    source: Source = Source.DEFAULT
    name: str = ""  # of the file, the variable or the flag
    line: int | None = None

    def __str__(self) -> str:
        name = self.name if self.name.isprintable() else ascii(self.name)
        match self.source:
            case Source.DEFAULT:
                return "default"
            case Source.FILE:
                return name if self.line is None else f"{name}:{self.line}"
            case Source.ENVIRONMENT:
                return f"environment {name}"
            case Source.COMMAND_LINE:
                return f"command line {name}"


DEFAULT_ORIGIN = Origin()


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what would be right."""

    origin: Origin
    setting: str  # as in the file: cluster.seeds; "" when it is about the whole file
    value: str | None  # as it may be shown; None when there is none to show
    message: str

    def __str__(self) -> str:
        what = self.setting if self.value is None else f"{self.setting} = {self.value}"
        return f"{self.origin}: {what}: {self.message}" if what else f"{self.origin}: {self.message}"


class SettingsError(Exception):
    """The settings cannot be used. ``problems`` is all that is wrong: file, environment, command line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Override:
    """A setting that was given on the command line, as text; a list when the flag may be repeated."""

    setting: str  # "cluster.seeds", "listeners", "listeners.0.address"
    value: str | list[str]
    flag: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in effect, and where each value came from. What is not in ``origins`` is the default."""

    settings: Settings
    origins: Mapping[Path, Origin]

    def origin_of(self, path: Path) -> Origin:
        return self.origins.get(path, DEFAULT_ORIGIN)


def load(
    *,
    file: FilePath | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[Override] = (),
) -> Loaded:
    """The settings from these sources. Without ``file``, STEADYREAD_CONFIG names it, if set.

    Reads the file and the password and token files that are named. Raises SettingsError with every problem.
    """
    environment = {} if environment is None else environment
    loading = _Loading()
    if file is None and environment.get(CONFIG_VARIABLE):
        file = FilePath(environment[CONFIG_VARIABLE])
    if file is not None:
        loading.add_file(file)
    loading.add_environment(environment)
    for override in overrides:
        loading.add_override(override)
    return loading.finish()


@dataclass(frozen=True, slots=True)
class _Given:
    value: object
    origin: Origin


_OriginOf = Callable[[Path], Origin]


class _Loading:
    """Gathers values from source after source, weakest first, and what is wrong with them."""

    def __init__(self) -> None:
        self._root = table_of(Settings)
        self._given: dict[Path, _Given] = {}
        self._array_counts: dict[Path, int] = {}  # array of tables -> how many; absent means the default
        self._table_origins: dict[Path, Origin] = {}  # each table of an array in the file -> its header
        self._wrong: set[Path] = set()  # options that some source gave wrongly
        self._problems: list[Problem] = []
        self._is_file_lost = False  # it was named but could not be read
        self._directory = FilePath()  # what a relative name in the file is relative to

    # One method per source.

    def add_file(self, file: FilePath) -> None:
        whole = Origin(Source.FILE, str(file))
        self._is_file_lost = True
        try:
            text = file.read_bytes().decode().replace("\r\n", "\n")
        except OSError as error:
            self._complain(whole, (), None, f"cannot be read: {error.strerror or error}")
            return
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self._complain(Origin(Source.FILE, str(file), line), (), None, "is not UTF-8 text")
            return
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            place = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", str(error))
            message = str(error)[: place.start()] if place else str(error)
            line = int(place[1]) if place and place[1] else text.rstrip("\n").count("\n") + 1
            self._complain(Origin(Source.FILE, str(file), line), (), None, f"is not valid TOML: {message}")
            return
        self._is_file_lost = False
        self._directory = file.parent
        lines = lines_of(text)
        self._add_table(
            document, self._root, (), lambda path: Origin(Source.FILE, str(file), lines.get(path))
        )

    def add_environment(self, environment: Mapping[str, str]) -> None:
        for variable in sorted(environment):
            text = environment[variable]
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in (CONFIG_VARIABLE, *EVENT_VARIABLES):
                continue
            if _is_from_kubernetes(variable, text):
                continue
            parts = variable.removeprefix(ENVIRONMENT_PREFIX).split("__")
            is_capitals = variable == variable.upper()
            origin = Origin(Source.ENVIRONMENT, variable)
            self._add_text([part.lower() for part in parts] if is_capitals else [""], text, origin)

    def add_override(self, override: Override) -> None:
        parts = override.setting.split(".")
        self._add_text(parts, override.value, Origin(Source.COMMAND_LINE, override.flag))

    def finish(self) -> Loaded:
        """Builds the settings and checks what concerns several of them."""
        self._check_arrays()
        self._read_secret_files()
        settings = self._build(self._root, ())
        if not isinstance(settings, Settings):
            raise TypeError("the schema's root is not Settings")
        self._check_together(settings)
        if self._problems:
            raise SettingsError(self._problems)
        return Loaded(settings, {path: given.origin for path, given in self._given.items()})

    # TOML values.

    def _add_table(
        self, values: Mapping[str, object], table: Table, path: Path, origin_of: _OriginOf
    ) -> None:
        for key, value in values.items():
            here = (*path, key)
            entry = table.entries.get(key)
            if entry is None:
                self._complain_unknown(origin_of(here), table, here, value)
            elif isinstance(entry, Option):
                self._add_value(entry, here, value, origin_of)
            elif entry.is_array:
                if not isinstance(value, list) or not all(isinstance(element, dict) for element in value):
                    message = f"is a list of tables; write {entry.header}"
                    self._complain(origin_of(here), here, None, message)
                    continue
                self._array_counts[here] = len(value)
                if not value and entry.count_default:
                    self._complain(origin_of(here), here, None, f"give at least one {entry.header} table")
                for index, element in enumerate(value):
                    self._table_origins[(*here, index)] = origin_of((*here, index))
                    self._add_table(element, entry, (*here, index), origin_of)
            elif isinstance(value, dict):
                self._add_table(value, entry, here, origin_of)
            else:
                self._complain(origin_of(here), here, None, f"is a table; write {entry.header}")

    def _add_value(self, option: Option, path: Path, value: object, origin_of: _OriginOf) -> None:
        try:
            self._given[path] = _Given(option.parse(value), origin_of(path))
        except ValueError as error:
            self._complain_value(option, path, value, error, origin_of)

    # Texts.

    def _add_text(self, parts: list[str], text: str | list[str], origin: Origin) -> None:
        """A value from the environment or the command line, at the option that ``parts`` name."""
        path: Path = ()
        entry: Option | Table = self._root
        remaining = list(parts)
        while remaining and isinstance(entry, Table):
            below = entry.entries.get(remaining.pop(0))
            if below is None:
                self._complain_unknown_text(origin, parts)
                return
            entry = below
            path = (*path, entry.name)
            if isinstance(entry, Table) and entry.is_array and remaining:
                index = remaining.pop(0)
                if not (index.isascii() and index.isdigit() and len(index) < 4 and str(int(index)) == index):
                    self._complain_unknown_text(origin, parts)
                    return
                path = (*path, int(index))
                entry = replace(entry, is_array=False)
        if remaining:
            self._complain_unknown_text(origin, parts)
        elif isinstance(entry, Option):
            self._add_option_text(entry, path, text, origin)
        elif entry.is_array:
            self._replace_array(entry, path, text, origin)
        else:
            names = ", ".join(_name_for(origin, (*path, name)) for name in entry.entries)
            self._complain(origin, path, None, f"is a table; set one of {names}")

    def _add_option_text(self, option: Option, path: Path, text: str | list[str], origin: Origin) -> None:
        try:
            value = option.parse_text(text) if isinstance(text, str) else option.parse(text)
        except ValueError as error:
            self._complain_value(option, path, text, error, lambda _: origin)
        else:
            self._given[path] = _Given(value, origin)

    def _replace_array(self, table: Table, path: Path, text: str | list[str], origin: Origin) -> None:
        """A list of texts, one for the first option of each table, takes the place of the tables so far."""
        name, option = next(iter(table.entries.items()))
        if not isinstance(option, Option):
            raise TypeError(f"{table.header} must begin with an option")
        texts = [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text
        if not texts and table.count_default:
            self._complain(origin, path, _shown(text), f"give at least one {name}")
            return
        self._given = {key: given for key, given in self._given.items() if key[: len(path)] != path}
        self._array_counts[path] = len(texts)
        for index, element in enumerate(texts):
            self._add_option_text(option, (*path, index, name), element, origin)

    # Building, and what concerns several settings.

    def _check_arrays(self) -> None:
        """An index from the environment or the command line may add one table after another, with no gap."""
        for path, array in self._root.arrays():
            count = self._array_counts.get(path, array.count_default)
            depth = len(path)
            below = [key for key in self._given if key[:depth] == path]
            for key in sorted(below, key=lambda key: int(key[depth])):
                index = int(key[depth])
                if index > count:
                    message = f"there is no {dotted((*path, index - 1))} before it"
                    self._complain(self._given[key].origin, key, None, message)
                    continue
                count = max(count, index + 1)
            self._array_counts[path] = count

    def _build(self, table: Table, path: Path) -> object:
        values: dict[str, object] = {}
        for name, entry in table.entries.items():
            here = (*path, name)
            if isinstance(entry, Option):
                values[name] = self._given[here].value if here in self._given else entry.default
            elif entry.is_array:
                values[name] = tuple(
                    self._build(entry, (*here, index)) for index in range(self._array_counts[here])
                )
            else:
                values[name] = self._build(entry, here)
        return table.kind(**values)

    def _read_secret_files(self) -> None:
        """``x_file`` beside a secret ``x``: the stronger source wins; one source may give only one."""
        for path, option in list(self._root.options(counts=self._array_counts)):
            file_path = (*path[:-1], f"{path[-1]}_file")
            named = self._given.get(file_path)
            if not option.says.is_secret or named is None or named.value == "":
                continue
            secret = self._given.get(path)
            if secret is not None and secret.value != "":
                if secret.origin.source == named.origin.source:
                    self._complain(
                        named.origin, file_path, None, f"give either this or {dotted(path)}, not both"
                    )
                    continue
                if secret.origin.source > named.origin.source:
                    del self._given[file_path]
                    continue
            self._read_secret_file(path, file_path, named)

    def _read_secret_file(self, path: Path, file_path: Path, named: _Given) -> None:
        file = FilePath(str(named.value))
        if named.origin.source is Source.FILE:
            file = self._directory / file
        file = file.absolute()
        shown = _shown(str(file))
        try:
            with file.open("rb") as stream:
                content = stream.read(SECRET_BYTES_MAX + 1)
            if len(content) > SECRET_BYTES_MAX:
                self._complain(named.origin, file_path, shown, f"is larger than {SECRET_BYTES_MAX} bytes")
                return
            secret = content.decode().removesuffix("\n").removesuffix("\r")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the file's name
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            self._complain(named.origin, file_path, shown, f"cannot be read: {reason}")
            return
        if not secret:
            self._complain(named.origin, file_path, shown, "is empty")
            return
        self._given[file_path] = _Given(str(file), named.origin)
        self._given[path] = _Given(secret, named.origin)

    def _check_together(self, settings: Settings) -> None:
        clients, admin = settings.clients, settings.admin
        if clients.unsent_bytes_hard_max < clients.unsent_bytes_max:
            self._complain_together(
                ("clients", "unsent_bytes_hard_max"),
                str(clients.unsent_bytes_hard_max),
                f"give at least clients.unsent_bytes_max, which is {clients.unsent_bytes_max}",
                also=("clients", "unsent_bytes_max"),
            )
        if not is_loopback(admin.address) and not admin.token:
            self._complain_together(
                ("admin", "address"),
                f'"{admin.address}"',
                "is not a loopback address, so set admin.token or admin.token_file too",
                also=("admin", "token"),
                also_file=("admin", "token_file"),
            )
        if not (admin.token.isascii() and admin.token.isprintable() and " " not in admin.token):
            self._complain_together(
                ("admin", "token"),
                SECRET_SHOWN,
                "give printable ASCII without spaces, as HTTP headers carry it",
            )
        for fault in [
            *user_faults(settings.users),
            *hook_faults(settings.hooks),
            *read_faults(settings),
            *snapshot_faults(settings.snapshots),
            *overload_faults(settings.overload),
            *cache_faults(settings.cache),
        ]:
            value = SECRET_SHOWN if fault.value is None else _shown(fault.value)
            self._complain_together(fault.path, value, fault.message, also=fault.also)
        taken: dict[Address, Path] = {}
        ports = [
            (listener.address, ("listeners", i, "address")) for i, listener in enumerate(settings.listeners)
        ]
        for address, path in [*ports, (admin.address, ("admin", "address"))]:
            if address in taken:
                self._complain_together(
                    path,
                    f'"{address}"',
                    f"is taken by {dotted(taken[address])}; give another",
                    also=taken[address],
                )
            elif address.port != 0:
                taken[address] = path

    # Complaints.

    def _complain(self, origin: Origin, path: Path, value: str | None, message: str) -> None:
        self._wrong.add(path)
        self._problems.append(Problem(origin, dotted(path), value, message))

    def _complain_value(
        self, option: Option, path: Path, value: object, error: ValueError, origin_of: _OriginOf
    ) -> None:
        self._wrong.add(path)
        if isinstance(error, WrongElementError):
            elements = value.split(",") if isinstance(value, str) else value
            if isinstance(elements, list):
                path, value = (*path, error.index), elements[error.index]
        self._complain(origin_of(path), path, _shown_of(option, value), str(error))

    def _complain_together(
        self, path: Path, value: str, message: str, also: Path = (), also_file: Path = ()
    ) -> None:
        """Unless a setting concerned is wrong or unread: then its default stands there, and misleads."""
        if not self._is_file_lost and self._wrong.isdisjoint({path, also, also_file} - {()}):
            self._complain(self._origin_near(path, also), path, value, message)

    def _origin_near(self, path: Path, also: Path) -> Origin:
        """Where the value at ``path`` was given; else where ``also`` was; else where their table in an array was."""
        for given_path in (path, also):
            if given_path in self._given:
                return self._given[given_path].origin
        table = path[:-1]
        if table in self._table_origins:
            return self._table_origins[table]
        beside = (given.origin for given_path, given in self._given.items() if given_path[:-1] == table)
        return next(beside, DEFAULT_ORIGIN)

    def _complain_unknown(self, origin: Origin, table: Table, path: Path, value: object) -> None:
        """Does not show the value: what a misspelt name holds may be a secret."""
        key = str(path[-1])
        if isinstance(value, dict | list) and len(path) == 1:
            tables = [name for name, entry in table.entries.items() if isinstance(entry, Table)]
            near = did_you_mean(key, tables)
            headers = ", ".join(table.entries[name].header for name in tables)  # type: ignore[union-attr]  # tables
            self._complain(origin, path, None, f"unknown table{near or '; there are ' + headers}")
            return
        hint = did_you_mean(key, list(table.entries))
        elsewhere = [below for below, _ in self._root.options() if below[-1] == key]
        if not hint and elsewhere:
            hint = f"; there is {' and '.join(dotted(below).replace('[0]', '[N]') for below in elsewhere)}"
        if not hint:
            hint = f"; {table.header if table.name else 'at the top'} there are {', '.join(table.entries)}"
        self._complain(origin, path, None, f"unknown setting{hint}")

    def _complain_unknown_text(self, origin: Origin, parts: list[str]) -> None:
        paths = [path for path, _ in self._root.options()]
        if origin.source is Source.ENVIRONMENT:
            hint = did_you_mean_variable(origin.name, [variable_of(path) for path in paths])
            self._complain(origin, (), None, f"unknown setting{hint}")
        else:
            hint = did_you_mean(".".join(parts), [".".join(map(str, path)) for path in paths])
            self._complain(origin, (".".join(parts),), None, f"unknown setting{hint}")


def is_loopback(address: Address) -> bool:
    """Whether only this machine can reach it. A name other than localhost counts as reachable by others."""
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host.lower() == "localhost"


def did_you_mean_variable(variable: str, variables: list[str]) -> str:
    """Compares what follows the prefix, which is the same in all and would make everything look near."""
    length = len(ENVIRONMENT_PREFIX)
    near = did_you_mean(variable[length:], [known[length:].lower() for known in variables])
    return re.sub(r'"(.*)"', lambda match: f'"{ENVIRONMENT_PREFIX}{match[1].upper()}"', near)


def _name_for(origin: Origin, path: Path) -> str:
    return variable_of(path) if origin.source is Source.ENVIRONMENT else dotted(path)


def _is_from_kubernetes(variable: str, text: str) -> bool:
    """Kubernetes describes each service to all pods of its namespace in variables of these forms."""
    if _KUBERNETES_VARIABLE.fullmatch(variable):
        return True
    is_url = text.startswith(("tcp://", "udp://", "sctp://"))
    return is_url and _KUBERNETES_PORT_VARIABLE.fullmatch(variable) is not None


def _shown_of(option: Option, value: object) -> str:
    if option.says.is_secret:
        return SECRET_SHOWN
    if option.kind is not str and isinstance(value, str) and "@" in value:
        return "(hidden, because it may hold a password)"
    return _shown(value)


def _shown(value: object) -> str:
    """``value`` as TOML would write it, on one line, printable and not too long."""
    text = _toml_like(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[: SHOWN_CHARACTERS_MAX - 3] + "..."


def _toml_like(value: object) -> str:
    match value:
        case dict():
            return "{...}"
        case list():
            return "[" + ", ".join(_toml_like(element) for element in value) + "]"
        case str():
            return json.dumps(value)
        case bool():
            return "true" if value else "false"
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)
