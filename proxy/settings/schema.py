"""The settings' dataclasses as a schema: what may be set, and how a given value becomes a setting.

Values come as TOML values or as text (environment, command line); both go through ``Option.parse``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

from proxy.settings.positions import Path
from proxy.settings.values import NodeZone, Says
from routing.topology import Address

ENVIRONMENT_PREFIX = "STEADYREAD_"
NO_COUNTS: Mapping[Path, int] = MappingProxyType({})
Element = TypeVar("Element")


class WrongElementError(ValueError):
    """One element of a list is wrong; the message says what would be right."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, slots=True)
class Option:
    """One value that can be set."""

    name: str
    kind: object  # str, bool, int, float, Address, an Enum, or a tuple of str, Address or NodeZone
    says: Says
    default: object

    def parse(self, given: object) -> object:
        """``given``, a TOML value, as a value of this option. Raises ValueError saying what is right."""
        value = self._of_kind(given)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_range(value)
        return value

    def parse_text(self, text: str) -> object:
        """``text``, from the environment or a flag. Raises ValueError saying what would be right."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("give a text in UTF-8") from None
        return self.parse(self._toml_value_of(text))

    def _toml_value_of(self, text: str) -> object:
        """``text`` as TOML would have given it; other text stays as it is, for ``parse`` to refuse."""
        stripped = text.strip()
        if self.kind is str:
            return text
        if self.kind is bool:
            return {"true": True, "false": False}.get(stripped, text)
        if (self.kind is int or self.kind is float) and stripped.isascii():
            for convert in (int, float):
                try:
                    return convert(stripped)
                except ValueError:
                    continue
        if get_origin(self.kind) is tuple:
            return [part.strip() for part in text.split(",")] if stripped else []
        return stripped

    def _of_kind(self, given: object) -> object:
        kind = self.kind
        if kind is str and isinstance(given, str):
            if self.says.choices and given not in self.says.choices:
                if reason := dict(self.says.not_offered).get(given):
                    raise ValueError(f"{reason}; {self._wanted()}")
                raise ValueError(self._wanted() + did_you_mean(given, self.says.choices))
            return given
        if kind is bool and isinstance(given, bool):
            return given
        if kind is int and isinstance(given, int) and not isinstance(given, bool):
            return given
        if kind is float and isinstance(given, int | float) and not isinstance(given, bool):
            try:
                number = float(given)
            except OverflowError:
                raise ValueError(self._wanted()) from None
            if not math.isfinite(number):
                raise ValueError(self._wanted())
            return number
        if kind is Address and isinstance(given, str):
            return self._address(given)
        if kind == tuple[str, ...] and isinstance(given, list):
            for index, element in enumerate(given):
                if not isinstance(element, str):
                    raise WrongElementError(index, "give a text in quotes")
            return tuple(given)
        if kind == tuple[NodeZone, ...] and isinstance(given, list):
            return tuple(self._element_at(index, element, self._zone) for index, element in enumerate(given))
        if get_origin(kind) is tuple and isinstance(given, list):
            if not given:
                raise ValueError("give at least one address")
            return tuple(
                self._element_at(index, element, self._address) for index, element in enumerate(given)
            )
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(given, str):
            choices = tuple(str(member.value) for member in kind)
            if given not in choices:
                raise ValueError(self._wanted() + did_you_mean(given, choices))
            return kind(given)
        raise ValueError(self._wanted())

    def _element_at(self, index: int, given: object, parse: Callable[[str], Element]) -> Element:
        if not isinstance(given, str):
            raise WrongElementError(index, self._wanted())
        try:
            return parse(given)
        except ValueError as error:
            raise WrongElementError(index, str(error)) from None

    def _address(self, text: str) -> Address:
        return parse_address(text, is_dialled=self.says.is_dialled)

    def _zone(self, text: str) -> NodeZone:
        address, _, zone = text.partition("=")
        if not zone or not zone.isprintable() or zone != zone.strip():
            raise ValueError('give HOST:PORT=ZONE, as in "10.0.0.1:6379=eu-west-1a"')
        return NodeZone(self._address(address), zone)

    def _check_range(self, number: float) -> None:
        says = self.says
        if (
            (says.at_least is not None and number < says.at_least)
            or (says.above is not None and number <= says.above)
            or (says.at_most is not None and number > says.at_most)
        ):
            raise ValueError(self._wanted())

    def _wanted(self) -> str:
        kind, says = self.kind, self.says
        if kind is str:
            return f"give one of {_quoted(says.choices)}" if says.choices else "give a text in quotes"
        if kind is bool:
            return "give true or false"
        if kind is Address:
            return 'give "HOST:PORT"'
        if kind == tuple[str, ...]:
            return "give a list of texts in quotes"
        if kind == tuple[NodeZone, ...]:
            return 'give a list of "HOST:PORT=ZONE"'
        if get_origin(kind) is tuple:
            return 'give a list of "HOST:PORT"'
        if isinstance(kind, type) and issubclass(kind, Enum):
            return f"give one of {_quoted(tuple(str(member.value) for member in kind))}"
        wanted = "give a whole number" if kind is int else "give a number"
        words = self.name.split("_")
        if "bytes" in words:
            wanted += " of bytes"
        elif words[-1] == "seconds":
            wanted += " of seconds"
        limits = [
            f"{word} {limit:.15g}"
            for word, limit in (("at least", says.at_least), ("above", says.above), ("at most", says.at_most))
            if limit is not None
        ]
        return wanted + (", " + " and ".join(limits) if limits else "")


@dataclass(frozen=True, slots=True)
class Table:
    """A TOML table, or each table of an array of tables."""

    name: str
    kind: type
    meaning: str
    is_array: bool
    entries: Mapping[str, Option | Table]
    count_default: int = 1  # of an array: how many tables there are when none is given
    parents: tuple[str, ...] = ()  # the names of the tables that it is in, outermost first

    @property
    def header(self) -> str:
        name = ".".join([*self.parents, self.name])
        return f"[[{name}]]" if self.is_array else f"[{name}]"

    @property
    def is_live(self) -> bool:
        """Whether all options in it are: then a reload may replace an array of them whole."""
        return all(option.says.is_live for _, option in self.options())

    def arrays(self, path: Path = ()) -> Iterator[tuple[Path, Table]]:
        """The arrays of tables below, each with its path. There is none within another."""
        for name, entry in self.entries.items():
            if isinstance(entry, Table):
                here = (*path, name)
                if entry.is_array:
                    yield here, entry
                else:
                    yield from entry.arrays(here)

    def options(
        self, path: Path = (), counts: Mapping[Path, int] = NO_COUNTS
    ) -> Iterator[tuple[Path, Option]]:
        """All options below, each with its path. ``counts``: tables in each array, one where it says nothing."""
        for name, entry in self.entries.items():
            here = (*path, name)
            if isinstance(entry, Option):
                yield here, entry
            elif entry.is_array:
                for index in range(counts.get(here, 1)):
                    yield from entry.options((*here, index), counts)
            else:
                yield from entry.options(here, counts)


@cache
def table_of(
    kind: type,
    name: str = "",
    is_array: bool = False,
    count_default: int = 1,
    parents: tuple[str, ...] = (),
) -> Table:
    """The schema of a settings dataclass."""
    above = (*parents, name) if name else ()
    hints = get_type_hints(kind, include_extras=True)
    entries: dict[str, Option | Table] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            value_kind, says = get_args(hint)
            if field.default is MISSING:
                raise TypeError(f"{kind.__name__}.{field.name} has no default")
            entries[field.name] = Option(field.name, value_kind, says, field.default)
        elif get_origin(hint) is tuple:
            count = len(field.default) if field.default is not MISSING else 1
            if is_array:
                raise TypeError(f"{kind.__name__}.{field.name}: an array within an array has no place here")
            entries[field.name] = table_of(get_args(hint)[0], field.name, True, count, above)
        else:
            entries[field.name] = table_of(hint, field.name, parents=above)
    return Table(name, kind, kind.__doc__ or "", is_array, MappingProxyType(entries), count_default, parents)


def dotted(path: Path) -> str:
    """``("listeners", 0, "address")`` as ``listeners[0].address``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def variable_of(path: Path) -> str:
    """The environment variable that sets the option at ``path``."""
    return ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in path)


def did_you_mean(given: str, choices: tuple[str, ...] | list[str]) -> str:
    """``; did you mean "x"?`` when one of ``choices`` is near, else an empty text."""
    near = get_close_matches(given.lower(), choices, n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _quoted(choices: tuple[str, ...]) -> str:
    return ", ".join(f'"{choice}"' for choice in choices)


def parse_address(text: str, *, is_dialled: bool) -> Address:
    """Stricter than ``Address.parse``: in a file, a slip is likelier than an unusual address."""
    example = "127.0.0.1:7379"
    if "://" in text or "@" in text or "/" in text:
        raise ValueError(f'give HOST:PORT alone, as in "{example}", without scheme, user or path')
    host, separator, port_text = text.rpartition(":")
    if not separator or not port_text.isascii() or not port_text.isdigit() or len(port_text) > 5:
        raise ValueError(f'give HOST:PORT, as in "{example}"')
    lowest = 1 if is_dialled else 0
    if not lowest <= int(port_text) <= 65535:
        raise ValueError(f"give a port from {lowest} to 65535")
    if not host:
        raise ValueError(f'give a host before the colon, as in "0.0.0.0:{port_text}"')
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f'give an IPv6 address in brackets, as in "[::1]:{port_text}"')
    if not host.isprintable() or any(character in " ,\"'" for character in host):
        raise ValueError(f'give HOST:PORT, as in "{example}"')
    return Address.parse(text)
